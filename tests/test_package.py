"""Tests of the package as a whole: public names, import side effects, command line, and cost of the gates."""

import inspect
import json
import os
import pkgutil
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_das
from keras_das import cli
from keras_das.kernels import library, targets
from tests import processes


def _run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_public_names():
    assert set(keras_das.__all__) >= {"DASLayer", "DeformableConv2D", "attach_das", "export", "ops"}
    assert all(hasattr(keras_das, name) for name in keras_das.__all__)


def test_a_name_is_a_module_or_something_in_one():
    """`keras_das.x` would be ambiguous after `from keras_das.x import x`."""
    modules = {module.name for module in pkgutil.iter_modules(keras_das.__path__)}
    for name in keras_das.__all__:
        assert (name in modules) == inspect.ismodule(getattr(keras_das, name)), name


@pytest.mark.parametrize("package", [keras_das, keras_das.ops, keras_das.visualize])
def test_nothing_leaks(package):
    """Apart from its public names, a package exposes only its own modules."""
    names = {name for name in vars(package) if not name.startswith("_")} - set(package.__all__)
    foreign = [
        name
        for name in names
        if getattr(package, name) is not sys.modules.get(f"{package.__name__}.{name}", package)
    ]
    assert foreign == []


def test_import_brings_nothing_heavy_along():
    """The import adds no third-party packages to those of Keras, and neither loads nor builds the kernels."""
    result = _run(
        """
        import sys
        import keras
        before = set(sys.modules)
        import keras_das
        print(*{name.split(".")[0] for name in set(sys.modules) - before})
        from keras_das.kernels import library
        print(*(name for name in sys.modules if name.startswith("keras_das.")))
        print(*(slot._reason or slot.path for slot in library._SLOTS.values()))
        """
    )
    packages, modules, slots = result.stdout.splitlines()
    assert set(packages.split()) <= {"keras_das", *sys.stdlib_module_names}
    assert "keras_das.kernels.library" in modules.split()
    assert not {"keras_das.kernels.builder", "keras_das.ops.native_tensorflow"} & set(modules.split())
    assert slots == "None None"


def test_kernels_without_a_framework():
    """The sanitizers and compute-sanitizer run the kernels in processes without the package's imports."""
    result = _run(
        """
        import sys
        import tests.ops.plain_kernels, tests.ops.random_cases
        print({"tensorflow", "jax", "keras", "keras_das"} & set(sys.modules))
        """
    )
    assert result.stdout.strip() == "set()"


def test_missing_tensorflow_is_one_clear_error():
    # A finder rather than `None` in `sys.modules`, so that the error is that of a missing package.
    result = _run(
        """
        import sys

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name == "tensorflow":
                    raise ModuleNotFoundError("No module named 'tensorflow'", name=name)

        sys.meta_path.insert(0, Hide())
        try:
            import keras_das
        except ImportError as error:
            print(error)
        """,
        KERAS_BACKEND="tensorflow",
    )
    assert "requires TensorFlow, which is not installed: pip install 'keras-das[tf]'" in result.stdout, result


def test_old_tensorflow_is_one_clear_error():
    result = processes.python(
        """
        import tensorflow
        tensorflow.__version__ = "2.9.0"
        try:
            import keras_das
        except ImportError as error:
            print(error)
        """
    )
    assert "requires TensorFlow 2.18 or newer, but 2.9.0" in result.stdout, result


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert sections["Versions"]["keras-das"] == keras_das.__version__
    assert sections["Versions"]["keras"] == keras.__version__
    assert sections["Backend"]["keras backend"] == "tensorflow"
    reason = library.why_not("tensorflow")
    for context in ("eager", "graph", "XLA"):
        (value,) = (v for k, v in sections["deformable_conv2d"].items() if k.startswith(context))
        assert value == (f"reference ({reason})" if reason else "native")
    found = sections["Kernel library"]
    if reason:
        assert found["library"] == f"none ({reason})"
        assert found["key wanted"] == targets.target("tensorflow").key
    else:
        assert found["key"] == targets.target("tensorflow").key
        assert found["key"] in found["library"]
        assert found["instruction set"] in ("avx512", "avx2", "baseline")


@pytest.mark.parametrize("backend", ["tensorflow", "numpy"])
def test_info_says_why_the_reference_runs(backend, tmp_path):
    """Covers a missing library, and a backend without kernels."""
    run = {"tensorflow": processes.python, "numpy": _run}[backend]  # `python` preloads TensorFlow
    result = run(
        """
        import pathlib, sys
        from keras_das import cli
        from keras_das.kernels import library
        library._PREBUILT = pathlib.Path("/no/such/folder")
        sys.exit(cli.main(["info", "--json"]))
        """,
        KERAS_BACKEND=backend,
        KERAS_DAS_CACHE=str(tmp_path / "empty"),
    )
    assert result.returncode == 0, result.stderr
    sections = json.loads(result.stdout)
    words = {"tensorflow": 'run "keras-das build"', "numpy": "no kernels for Keras"}[backend]
    assert words in sections["Kernel library"]["library"]
    assert len(sections["deformable_conv2d"]) == 3
    for value in sections["deformable_conv2d"].values():
        assert value.startswith("reference (")
        assert words in value


def test_info_as_table(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["keras-das", keras_das.__version__] for line in lines)


@pytest.mark.slow
def test_module_runs_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "keras_das", "--version"], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.split() == ["keras-das", keras_das.__version__]
    assert result.returncode == 0


def test_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["paint"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def _multiply_adds(layer, size, interpolation=True):
    """Multiply-adds of a layer for an output of `size` (height, width), derived from its weights."""
    pixels = int(np.prod(size))
    if isinstance(layer, keras_das.DASLayer):
        inner = layer._flatten_layers(include_self=False, recursive=False)
        return sum(_multiply_adds(part, size, interpolation) for part in inner)
    if isinstance(layer, keras_das.DeformableConv2D):
        # Each sampled value requires four products for its corners and one for the mask.
        channels = layer.offset_kernel.shape[2]
        sampled = layer.taps * channels * 5 if interpolation else 0
        return pixels * (int(np.prod(layer.kernel.shape)) + int(np.prod(layer.offset_kernel.shape)) + sampled)
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense | keras.layers.DepthwiseConv2D):
        return pixels * int(np.prod(layer.kernel.shape))
    return 0


def _cost(model):
    layers = [layer for layer in model.layers if layer.weights]
    return sum(_multiply_adds(layer, layer.output.shape[1:-1]) for layer in layers)


@pytest.mark.slow
def test_four_gates_fit_the_budget(capsys):
    """Gates after all four stages of ResNet-50 at 224x224 add at most 2.6 M weights and 11% multiply-adds."""
    from keras_hub.models import ResNetBackbone

    plain = ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
        use_pre_activation=False,
        image_shape=(224, 224, 3),
    )
    gated = keras_das.attach_das(plain)
    weights, more = plain.count_params(), gated.count_params() - plain.count_params()
    cost, dearer = _cost(plain), _cost(gated) - _cost(plain)
    with capsys.disabled():
        print(
            f"\nResNet-50 at 224x224: {weights / 1e6:.2f} M weights, {cost / 1e9:.2f} G multiply-adds; "
            f"four gates: +{more / 1e6:.2f} M weights, +{100 * dearer / cost:.1f} % multiply-adds"
        )
    assert 4.0e9 < cost < 4.2e9  # validates the count: 4.1 G in the literature
    assert 0 < more <= 2.6e6
    assert 0 < dearer <= 0.11 * cost
