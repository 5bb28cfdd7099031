"""Tests of the op with any Keras backend and its autodiff.

    KERAS_BACKEND=jax python -m pytest tests/ops/backend_check.py

pytest does not collect this file automatically. `test_backends.py` runs it with JAX.
"""

import functools
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_das.layers.depthwise import depthwise_by_shifts
from tests.ops.op_cases import (
    COMPILED_CASES,
    DATA_FORMATS,
    DTYPES,
    Case,
    assert_as_expected,
    call,
    draw,
    expected,
    from_layout,
    numpy_dtype,
    relative_error,
    split_upstream,
    to_layout,
)

BACKEND = keras.backend.backend()


class Jax:
    """Gradients by `jax.vjp`, with or without `jax.jit`. For a single call, `jax.jit` is faster."""

    modes = ("jit", "eager")

    def value_and_gradients(self, function, arguments, upstream, mode="eager"):
        import jax

        def compute(arguments, upstream):
            outputs, pull_back = jax.vjp(function, arguments)
            return outputs, pull_back(upstream)[0]

        return (jax.jit(compute) if mode == "jit" else compute)(arguments, upstream)

    def second_order(self, function, arguments, directions):
        import jax

        def compute(arguments, directions):
            gradient = jax.grad(lambda given: function(given).sum())
            _, pull_back = jax.vjp(gradient, arguments)
            return pull_back(directions)[0]

        return jax.jit(compute)(arguments, directions)


class Torch:
    """Gradients by `torch.autograd`."""

    modes = ("eager",)

    def value_and_gradients(self, function, arguments, upstream, mode="eager"):
        import torch

        arguments = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
        outputs = function(arguments)
        gradients = torch.autograd.grad(outputs, list(arguments.values()), upstream)
        return outputs.detach(), dict(zip(arguments, gradients, strict=True))

    def second_order(self, function, arguments, directions):
        import torch

        arguments = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
        tensors = list(arguments.values())
        gradients = torch.autograd.grad(function(arguments).sum(), tensors, create_graph=True)
        pairs = zip(gradients, directions.values(), strict=True)
        product = sum((gradient * direction).sum() for gradient, direction in pairs)
        seconds = torch.autograd.grad(product, tensors, materialize_grads=True)
        return dict(zip(arguments, seconds, strict=True))


class TensorFlow:
    """Gradients by `tf.GradientTape`. The other test modules cover TensorFlow in more detail."""

    modes = ("eager",)

    def value_and_gradients(self, function, arguments, upstream, mode="eager"):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(arguments)
        return outputs, tape.gradient(outputs, arguments, upstream)

    def second_order(self, function, arguments, directions):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(arguments)
            _, gradients = self.value_and_gradients(function, arguments, None)
        return tape.gradient(gradients, arguments, directions)


# With backends other than TensorFlow, Keras' result type of float64 is float32.
PRECISIONS = [dtype for dtype in DTYPES if keras.backend.result_type(dtype, dtype) == dtype]
AUTODIFF = {"jax": Jax, "torch": Torch, "tensorflow": TensorFlow}[BACKEND]()


def to_numpy(tensor):
    """Converts a tensor of any backend. NumPy cannot convert torch's bfloat16."""
    if BACKEND == "torch" and "bfloat16" in str(tensor.dtype):
        return tensor.float().numpy()
    return np.asarray(tensor)


def to_tensors(arrays, data_format="channels_last"):
    return {name: to_tensor(to_layout(name, array, data_format)) for name, array in arrays.items()}


def to_tensor(array):
    """Converts an array to a tensor of its dtype via float32, since torch cannot read NumPy's bfloat16."""
    if array.dtype.itemsize == 2:
        return keras.ops.cast(keras.ops.convert_to_tensor(array.astype("float32")), array.dtype.name)
    return keras.ops.convert_to_tensor(array, array.dtype.name)


def check(case, arrays, dtype, mode, data_format, implementation):
    arguments, upstream = split_upstream(to_tensors(arrays, data_format))
    function = functools.partial(call, case=case, data_format=data_format, implementation=implementation)
    outputs, gradients = AUTODIFF.value_and_gradients(function, arguments, upstream, mode)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert_as_expected(
        case,
        arrays,
        dtype,
        from_layout("outputs", to_numpy(outputs), data_format),
        {name: from_layout(name, to_numpy(tensor), data_format) for name, tensor in gradients.items()},
    )


@pytest.mark.parametrize(
    ("case", "data_format"),
    [
        pytest.param(case, DATA_FORMATS[number % 2], marks=() if number in (0, 5) else pytest.mark.slow)
        for number, case in enumerate(COMPILED_CASES)
    ],
    ids=str,
)
def test_values_and_gradients(rng, case, data_format, implementation):
    check(case, draw(case, rng), "float32", AUTODIFF.modes[0], data_format, implementation)


@pytest.mark.parametrize(
    ("dtype", "data_format", "mode"),
    [
        pytest.param(
            dtype,
            DATA_FORMATS[number % 2],
            AUTODIFF.modes[(number + 1) % len(AUTODIFF.modes)],
            marks=() if dtype == "bfloat16" else pytest.mark.slow,
        )
        for number, dtype in enumerate(PRECISIONS)
    ],
)
def test_dtypes(rng, dtype, data_format, mode, implementation):
    case = Case("", kernel_size=(1, 2), groups=2, offset_groups=2, padding="same", strides=2)
    check(case, draw(case, rng, dtype), dtype, mode, data_format, implementation)


@pytest.mark.slow
def test_second_order_gradients(rng, implementation):
    """Compares with finite differences of the oracle's gradients in the direction of `directions`."""
    case = Case("", batch=1, image=(4, 5), kernel_size=(1, 2), groups=2, offset_groups=2, padding="same")
    arrays, _ = split_upstream(draw(case, rng, generic=True))
    directions = {
        name: rng.uniform(-1, 1, size=array.shape).astype("float32") for name, array in arrays.items()
    }
    function = functools.partial(call, case=case, implementation=implementation)
    seconds = AUTODIFF.second_order(function, to_tensors(arrays), to_tensors(directions))

    def first_order(distance):
        moved = {name: array + np.float64(distance) * directions[name] for name, array in arrays.items()}
        _, gradients = expected(case, {**moved, "outputs": np.ones(case.shapes["outputs"])})
        return gradients

    ahead, behind = first_order(1e-5), first_order(-1e-5)
    for name, second in seconds.items():
        wanted = (ahead[name] - behind[name]) / 2e-5
        if second is not None:  # TensorFlow uses None for zero
            assert relative_error(to_numpy(second), wanted) < 1e-5, name


def test_borders_and_bad_numbers(rng, implementation):
    """Covers whole pixels, both borders, positions far out of bounds, and NaN in one image."""
    case = Case("", kernel_size=(1, 1), image=(8, 8))
    arrays = draw(case, rng)
    special = [-1, 0, 1, 7, 8, -1e9, 1e30, np.inf, 0.5, -0.25]
    arrays["offsets"][:] = rng.choice(special, size=arrays["offsets"].shape)
    check(case, arrays, "float32", AUTODIFF.modes[0], "channels_last", implementation)

    arrays["offsets"][0, 3, 2, 1] = np.nan
    arguments, _ = split_upstream(to_tensors(arrays))
    outputs = to_numpy(call(arguments, case, implementation=implementation))
    assert np.isnan(outputs[0, 3, 2]).all()
    assert np.isnan(outputs).sum() == case.filters


def test_functional_model_round_trip(rng, tmp_path):
    case = Case("", kernel_size=(1, 2), padding="same", strides=2)
    arrays, _ = split_upstream(draw(case, rng))
    symbols = {name: keras.Input(batch_shape=array.shape, name=name) for name, array in arrays.items()}
    model = keras.Model(symbols, call(symbols, case))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    wanted = to_numpy(call(to_tensors(arrays), case))
    np.testing.assert_array_equal(to_numpy(loaded(to_tensors(arrays))), wanted)


def test_dtypes_of_arrays():
    """The dtype of the result depends on the dtypes of `inputs` and `kernel`."""
    case = Case("", kernel_size=(1, 1), modulated=False, use_bias=False)
    shapes = case.shapes
    arguments = {name: np.zeros(shapes[name], "float32") for name in ("inputs", "kernel", "offsets")}
    arguments["inputs"] = arguments["inputs"].astype(numpy_dtype("float16"))
    outputs = call(arguments, case)
    assert keras.backend.standardize_dtype(outputs.dtype) == keras.backend.result_type("float16", "float32")


jax_only = pytest.mark.skipif(BACKEND != "jax", reason="of JAX alone")


@jax_only
def test_compiled_programs_hold_the_kernels(rng, kernels):
    import jax

    case = Case("", padding="same")
    arguments, upstream = split_upstream(to_tensors(draw(case, rng)))
    function = functools.partial(call, case=case, implementation="auto")
    text = jax.jit(lambda a, u: jax.vjp(function, a)[1](u)).lower(arguments, upstream).as_text()
    assert text.count("custom_call @keras_das_deformable_conv2d_grad(") == 1
    text = jax.jit(function).lower(arguments).as_text()
    assert text.count("custom_call @keras_das_deformable_conv2d(") == 1


@jax_only
@pytest.mark.parametrize(("dtype", "bits"), [("float16", "e5m10"), ("bfloat16", "e8m7")])
def test_compiled_programs_round_16_bit_operands(rng, dtype, bits, kernels):
    """CUDA kernels rely on the rounding, and XLA may remove conversions to 16 bits and back."""
    import jax

    case = Case("", padding="same")
    arguments, upstream = split_upstream(to_tensors(draw(case, rng, dtype)))
    function = functools.partial(call, case=case, implementation="native")
    text = jax.jit(lambda a, u: jax.vjp(function, a)[1](u)).lower(arguments, upstream).as_text()
    rounded = [line for line in text.splitlines() if "reduce_precision" in line]
    assert len(rounded) >= 2, text  # the kernel, and the gradient of the output
    assert all(bits in line for line in rounded)


@jax_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_or_not_gives_the_same_bits(rng, dtype, kernels):
    case = Case("", padding="same", groups=2, offset_groups=2)
    arguments, upstream = split_upstream(to_tensors(draw(case, rng, dtype)))
    function = functools.partial(call, case=case, implementation="native")
    eager, compiled = (
        AUTODIFF.value_and_gradients(function, arguments, upstream, mode) for mode in ("eager", "jit")
    )
    np.testing.assert_array_equal(to_numpy(compiled[0]), to_numpy(eager[0]))
    for name, gradient in eager[1].items():
        np.testing.assert_array_equal(to_numpy(compiled[1][name]), to_numpy(gradient), err_msg=name)


@jax_only
@pytest.mark.parametrize("name", ["kernel", "outputs"])
def test_subnormal_numbers(rng, name, kernels):
    """Below 2^-14, the numbers of float16 are subnormal. Gradients in half precision are often that small."""
    case = Case("", groups=2, padding="same")
    tensors = draw(case, rng, "float16")
    tensors[name] *= np.float16(2.0**-16)
    check(case, tensors, "float16", "jit", "channels_last", "native")


@jax_only
@pytest.mark.parametrize("mode", ["jit", pytest.param("eager", marks=pytest.mark.slow)])
def test_vectorized(rng, mode, kernels):
    """`vmap` over inputs, offsets, and masks with a shared kernel."""
    import jax

    case = Case("", padding="same", use_bias=False)
    drawn = [draw(case, rng) for _ in range(3)]
    stacked = {name: np.stack([tensors[name] for tensors in drawn]) for name in drawn[0]}
    stacked["kernel"] = drawn[0]["kernel"]
    arguments, upstream = split_upstream(to_tensors(stacked))
    axes = {name: None if name == "kernel" else 0 for name in arguments}

    def compute(arguments, upstream):
        outputs, pull_back = jax.vjp(functools.partial(call, case=case, implementation="native"), arguments)
        return outputs, pull_back(upstream)[0]

    compute = jax.vmap(compute, in_axes=(axes, 0))
    outputs, gradients = (jax.jit(compute) if mode == "jit" else compute)(arguments, upstream)
    for number, tensors in enumerate(drawn):
        tensors = {**tensors, "kernel": drawn[0]["kernel"]}
        alone = {name: to_numpy(gradient[number]) for name, gradient in gradients.items()}
        assert_as_expected(case, tensors, "float32", to_numpy(outputs[number]), alone)


@jax_only
@pytest.mark.slow
def test_full_precision(kernels):
    """float64 requires JAX's x64 mode, which must be enabled when the process starts."""
    script = """
import keras, numpy as np
from tests.ops.op_cases import Case, assert_as_expected, call, draw, split_upstream
import jax
case = Case("", padding="same", groups=2, offset_groups=2)
tensors = draw(case, np.random.default_rng(0), "float64")
arguments, upstream = split_upstream({name: jax.numpy.asarray(a) for name, a in tensors.items()})
outputs, pull_back = jax.vjp(lambda a: call(a, case, implementation="native"), arguments)
assert outputs.dtype == "float64"
assert_as_expected(case, tensors, "float64", outputs, pull_back(upstream)[0])
"""
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        cwd=pathlib.Path(__file__).parents[2],
        check=True,
        timeout=300,
    )


def test_depthwise_by_shifts():
    """All backends support it, although it is faster only with XLA on CPUs."""
    rng = np.random.default_rng(0)
    shapes = {"inputs": (2, 7, 5, 3), "kernel": (3, 2, 3), "upstream": (2, 7, 5, 3)}
    tensors = {name: to_tensor(rng.normal(size=shape).astype("float32")) for name, shape in shapes.items()}
    upstream = tensors.pop("upstream")

    def ours(given):
        return depthwise_by_shifts(given["inputs"], given["kernel"])

    def theirs(given):
        return keras.ops.depthwise_conv(given["inputs"], given["kernel"][..., None], padding="same")

    mode = AUTODIFF.modes[0]
    results = [AUTODIFF.value_and_gradients(f, tensors, upstream, mode) for f in (ours, theirs)]
    (found, gradients), (expected, wanted) = results
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), rtol=1e-4, atol=1e-5)
    for name in tensors:
        np.testing.assert_allclose(to_numpy(gradients[name]), to_numpy(wanted[name]), rtol=1e-4, atol=1e-5)


@jax_only
def test_handlers_refuse_by_name(kernels):
    """Direct calls of the handlers with invalid arguments raise errors instead of reading out of bounds."""
    import jax
    from jax import numpy as jnp

    from keras_das.ops import native_jax

    attributes = {
        "strides": np.array([1, 1]),
        "dilations": np.array([1, 1]),
        "padding": "EXPLICIT",
        "explicit_paddings": np.zeros(4, np.int64),
        "offset_groups": np.int64(1),
        "has_mask": True,
        "has_bias": True,
        "deterministic": False,
    }
    shapes = [(2, 7, 8, 4), (3, 3, 4, 6), (2, 5, 6, 18), (2, 5, 6, 9), (6,)]

    def convolve(result=(2, 5, 6, 6), **changed):
        changed = {"dtypes": ["float32"] * 5, "shapes": shapes, "attributes": attributes, **changed}
        tensors = map(jnp.zeros, changed["shapes"], changed["dtypes"])
        results = jax.ShapeDtypeStruct(result, "float32")
        return jax.ffi.ffi_call(native_jax._FORWARD, results)(*tensors, **changed["attributes"])

    assert convolve().shape == (2, 5, 6, 6)
    for wrong, message in (
        ({"result": (2, 5, 6, 7)}, r"`output` must have shape \(2, 5, 6, 6\)"),
        ({"shapes": [(7, 8, 4), *shapes[1:]]}, "`inputs` must have rank 4"),
        ({"shapes": [*shapes[:2], (2, 5, 6, 9), *shapes[3:]]}, "`offsets` must have shape"),
        ({"shapes": [*shapes[:3], (0,), (6,)]}, "`mask` must have shape"),
        ({"shapes": [*shapes[:4], (5,)]}, "`bias` must have shape"),
        ({"dtypes": ["float32", "float16", *["float32"] * 3]}, "`kernel` must have"),
        ({"dtypes": ["int32", *["float32"] * 4]}, "`inputs` must be float16"),
        ({"attributes": {**attributes, "strides": np.array([0, 1])}}, "`strides` must be positive"),
        ({"attributes": {**attributes, "strides": np.array([1])}}, "`strides` must be 2 integers"),
        ({"attributes": {**attributes, "padding": "FULL"}}, "`padding` must be"),
    ):
        with pytest.raises(Exception, match=message):
            convolve(**wrong).block_until_ready()
