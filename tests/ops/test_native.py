"""Tests of the kernels' TensorFlow bindings: supported calls, errors, and agreement between bindings."""

import inspect
import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das.exporters import saved_model
from keras_das.kernels import library, targets
from keras_das.ops import deformable, native, reference
from tests import processes
from tests.ops import random_cases
from tests.ops.op_cases import DTYPES, Case, assert_as_expected, call, draw, each_once_fast, split_upstream
from tests.ops.tf_harness import (
    MODES,
    kernels_value_and_gradients,
    needs_xla_kernels,
    run,
    tensors_of,
    value_and_gradients,
)

pytestmark = pytest.mark.usefixtures("kernels")

FORWARD, BACKWARD = "KerasDas>DeformableConv2D", "KerasDas>DeformableConv2DGrad"
DEPTHWISE = Case("depthwise", image=(9, 8), groups=4, filters=4, padding="same")
DENSE = Case("dense", image=(9, 8), strides=2, groups=2, offset_groups=2, modulated=False)


@pytest.fixture
def no_reference(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("this went through the reference")

    monkeypatch.setattr(reference, "deformable_conv2d", refuse)


def run_script(script, *arguments):
    result = processes.python(script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", [deformable, native, reference], ids=lambda module: module.__name__)
def test_autograph_converts_every_function(module):
    """A user's `tf.function` logs a warning for each function on the way that TensorFlow cannot convert."""
    functions = [value for value in vars(module).values() if inspect.isfunction(value)]
    for function in functions:
        function = inspect.unwrap(function)
        if function.__module__ == module.__name__ and not inspect.isgeneratorfunction(function):
            tf.autograph.to_graph(function)


# Numerical tests in addition to those of all implementations in test_deformable.py


# The kernels process blocks of 512 matrix rows, 240 pixels, 32 channels, or one vector.
BLOCKS = [
    Case("rows", image=(5, 4), channels=130, filters=33, padding="same"),
    Case("filters", image=(4, 4), channels=9, filters=530, kernel_size=(1, 2)),
    Case("pixels", image=(26, 25), channels=3, filters=4, kernel_size=(2, 1), padding="same"),
    Case("slices", image=(6, 5), channels=140, groups=140, filters=140, padding="same", offset_groups=2),
    Case("slices_of_groups", image=(6, 5), channels=90, groups=2, filters=6, padding="same", offset_groups=6),
    # Too large for working copies of entire images.
    Case("large_image", batch=1, image=(200, 200), channels=51, groups=51, filters=51, strides=23),
    Case("large_image_dense", batch=1, image=(200, 200), channels=51, filters=5, strides=23),
]


@pytest.mark.parametrize(("case", "dtype"), each_once_fast(BLOCKS, DTYPES), ids=str)
def test_more_than_a_block(rng, case, dtype):
    tensors = draw(case, rng, dtype)
    assert_as_expected(case, tensors, dtype, *run(case, tensors, implementation="native"))


@pytest.mark.parametrize("count", [120, pytest.param(600, marks=pytest.mark.slow)])
def test_random_cases(rng, count):
    """A sample of the cases that `python -m tests.ops.random_cases` runs by the thousands."""
    random_cases.check(kernels_value_and_gradients, count, rng)


@pytest.mark.slow
def test_no_memory_is_an_error_of_the_call():
    """The working copies require about twenty times the memory of the tensors."""
    found = run_script(
        """
        import resource
        import tensorflow as tf
        import keras_das

        def compute():
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                outputs = keras_das.ops.deformable_conv2d(*tensors, padding="same", implementation="native")
            return tape.gradient(outputs, tensors)

        small = [tf.ones((1, 4, 4, 32)), tf.ones((15, 15, 32, 1)), tf.zeros((1, 4, 4, 450))]
        large = [tf.ones((4, 32, 32, 1024)), tf.ones((15, 15, 1024, 1)), tf.zeros((4, 32, 32, 450))]
        tensors = small
        compute()  # what is loaded once is loaded
        tensors = large
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
        try:
            compute()
        except tf.errors.ResourceExhaustedError as error:
            print(error.message)
        """
    )
    assert "out of memory: there is none for the kernels' working copies" in found


# Calls that use the kernels


@pytest.mark.parametrize(
    ("mode", "data_format"),
    [
        ("eager", "channels_last"),
        ("graph", "channels_first"),
        pytest.param("xla", "channels_first", marks=needs_xla_kernels),
    ],
)
def test_auto_takes_the_kernels(rng, mode, data_format, no_reference):
    tensors = draw(DEPTHWISE, rng)
    results = run(DEPTHWISE, tensors, mode, data_format, implementation="auto")
    assert_as_expected(DEPTHWISE, tensors, "float32", *results)


def test_an_eager_call_decides_once(rng, monkeypatch):
    """The call creates no operation, lists no devices, and queries the library once."""
    asked = []
    monkeypatch.setattr(library, "why_not", lambda framework: asked.append(framework) or "")
    monkeypatch.setattr(deformable, "DeformableConv2DOperation", None)
    monkeypatch.setattr(tf.config, "list_logical_devices", None)
    arguments, _ = split_upstream(draw(DEPTHWISE, rng))
    assert call(arguments, DEPTHWISE, implementation="native").shape == DEPTHWISE.shapes["outputs"]
    assert asked == ["tensorflow"]


def test_reference_does_not(rng, monkeypatch):
    monkeypatch.setattr(native, "deformable_conv2d", None)
    arguments, _ = split_upstream(draw(DEPTHWISE, rng))
    assert call(arguments, DEPTHWISE, implementation="reference").shape == DEPTHWISE.shapes["outputs"]


@needs_xla_kernels
def test_compiled_programs_hold_the_calls(rng):
    arguments, upstream = split_upstream(tensors_of(draw(DEPTHWISE, rng)))

    def compute(arguments, upstream):
        return value_and_gradients(arguments, upstream, case=DEPTHWISE, implementation="auto")

    compiled = tf.function(compute, jit_compile=True)
    hlo = compiled.experimental_get_compiler_ir(arguments, upstream)(stage="optimized_hlo")
    for name in ("keras_das_deformable_conv2d", "keras_das_deformable_conv2d_grad"):
        assert hlo.count(f'custom_call_target="{name}"') == 1, hlo


@needs_xla_kernels
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float16", "exponent_bits=5, mantissa_bits=10"), ("bfloat16", "exponent_bits=8, mantissa_bits=7")],
)
def test_compiled_programs_round_16_bit_operands(rng, dtype, bits):
    """CUDA kernels rely on the rounding, and XLA may remove conversions to 16 bits and back."""
    arguments, upstream = split_upstream(tensors_of(draw(DENSE, rng, dtype)))

    def compute(arguments, upstream):
        return value_and_gradients(arguments, upstream, case=DENSE, implementation="native")

    compiled = tf.function(compute, jit_compile=True)
    hlo = compiled.experimental_get_compiler_ir(arguments, upstream)(stage="hlo")
    rounded = [line for line in hlo.splitlines() if "reduce-precision(" in line]
    assert len(rounded) == 3, hlo  # the kernel in both passes, and the gradient of the output
    assert all(bits in line for line in rounded)


@needs_xla_kernels
def test_compiled_although_the_runtime_started_without_the_library():
    """TensorFlow collects XLA kernels when its runtime starts, in this case before the library is loaded."""
    found = run_script(
        """
        import tensorflow as tf
        tf.function(lambda x: x + 1, jit_compile=True)(tf.ones(()))
        import keras_das
        from keras_das.kernels import library, targets
        assert library.path("tensorflow") is None
        layer = keras_das.DeformableConv2D(2, 3, implementation="native")
        print(tf.function(layer, jit_compile=True)(tf.ones((1, 5, 5, 1))).shape)
        """
    )
    assert found.strip() == "(1, 3, 3, 2)"


@pytest.fixture
def model(request):
    """A model with both layers and the requested dtype policy."""
    layers = [
        keras_das.DASLayer(reduction=0.5, dtype=request.param),
        keras_das.DeformableConv2D(3, 3, offset_initializer="random_normal", dtype=request.param),
    ]
    return keras.Sequential([keras.Input((8, 9, 4)), *layers])


@pytest.mark.parametrize("model", ["float32", "mixed_float16", "mixed_bfloat16", "float64"], indirect=True)
def test_layers_take_the_kernels_in_both_directions(model, no_reference):
    def gradients(images):
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
        return tape.gradient(outputs, model.trainable_weights)

    assert operations(lambda: gradients(tf.ones((2, 8, 9, 4)))) >= {FORWARD, BACKWARD}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mixed_bfloat16"], indirect=True)
def test_layers_train_with_the_kernels(rng, model, no_reference):
    model.compile("sgd", "mse", jit_compile=True)
    before = [np.array(weight) for weight in model.trainable_weights]
    images, targets = rng.normal(size=(2, 8, 9, 4)), rng.normal(size=(2, 6, 7, 3))
    assert np.isfinite(model.fit(images, targets, verbose=0).history["loss"][0])
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.any(weight != old), weight.path


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_as_near_as_the_reference(rng, policy):
    images = rng.normal(size=(2, 9, 9, 4))
    layer = keras_das.DeformableConv2D(3, 3, offset_initializer="random_normal", dtype=policy)
    layer.build(images.shape)
    outputs = {}
    for layer.implementation in ("native", "reference"):
        outputs[layer.implementation] = np.asarray(layer(images)).astype("float64")
    ulp = 2.0**-10 if policy == "mixed_float16" else 2.0**-7
    np.testing.assert_allclose(outputs["native"], outputs["reference"], rtol=ulp, atol=ulp)


# Reasons for not using the kernels


class Device:
    """A fake `tf.config.LogicalDevice` with the attributes that are used."""

    def __init__(self, device_type):
        self.device_type = device_type


@pytest.fixture
def with_gpu(monkeypatch):
    """Simulates a machine with a GPU and a library without CUDA kernels."""
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: [Device("CPU"), Device("GPU")])
    monkeypatch.setattr(library, "cuda_architectures", lambda framework: "")


@pytest.fixture
def with_cuda(monkeypatch, with_gpu):
    """Simulates a machine with a GPU and a library with CUDA kernels."""
    monkeypatch.setattr(library, "cuda_architectures", lambda framework: "sm_90")
    monkeypatch.setattr(library, "cuda_problem", lambda framework: "")


@pytest.mark.parametrize("context", [None, "eager", "graph", pytest.param("XLA", marks=needs_xla_kernels)])
def test_why_not_answers_without_tensors(context, monkeypatch):
    assert native.why_not(context) == ""
    assert native.can_use(context)
    monkeypatch.setattr(library, "why_not", lambda framework: "it is Sunday")
    assert native.why_not(context) == "it is Sunday"
    assert not native.can_use(context)
    with pytest.raises(RuntimeError, match='implementation="native" cannot be used: it is Sunday'):
        native.can_use(context, raise_error=True)


def test_why_not_knows_contexts():
    with pytest.raises(ValueError, match=r"`context` must be one of .* Received: context='jit'"):
        native.why_not("jit")


def test_other_backends_have_none(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    assert native.why_not() == "there are no kernels for Keras' torch backend"


@pytest.mark.parametrize("variable", [keras.Variable, tf.Variable, tf.constant])
def test_where_variables_lie(rng, with_cuda, variable):
    arguments, _ = split_upstream(draw(DEPTHWISE, rng))
    placed = {name: variable(value) for name, value in arguments.items()}
    outputs = call(placed, DEPTHWISE, implementation="native")
    np.testing.assert_array_equal(outputs, call(arguments, DEPTHWISE, implementation="native"))


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_graphs_go_where_the_gpu_is(rng, mode, with_gpu):
    arguments, _ = split_upstream(tensors_of(draw(DEPTHWISE, rng)))

    def on_cpu(arguments):
        with tf.device("CPU:0"):
            return call(arguments, DEPTHWISE, implementation="native")

    def anywhere(arguments):
        return call(arguments, DEPTHWISE, implementation="native")

    assert MODES[mode](on_cpu)(arguments).shape == DEPTHWISE.shapes["outputs"]
    with pytest.raises(RuntimeError, match="kernels run on the CPU only, and there is a GPU"):
        MODES[mode](anywhere)(arguments)


@pytest.fixture
def without_xla(monkeypatch):
    """TensorFlow without the header that the kernels require in XLA programs."""
    monkeypatch.setattr(targets, "xla_problem", lambda: "it is Sunday")


def test_without_the_binding_for_xla_only_xla_programs_use_the_reference(rng, without_xla):
    assert [native.why_not(context) for context in native.CONTEXTS] == ["", "", "it is Sunday"]
    arguments, upstream = split_upstream(tensors_of(draw(DEPTHWISE, rng)))

    def compute(arguments, upstream):
        return value_and_gradients(arguments, upstream, case=DEPTHWISE, implementation="auto")

    assert FORWARD in operations(lambda: compute(arguments, upstream))
    compiled = tf.function(compute, jit_compile=True)
    assert not operations(lambda: compiled(arguments, upstream)) & {FORWARD, BACKWARD}
    found, wanted = compiled(arguments, upstream), compute(arguments, upstream)
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='"native" cannot be used: it is Sunday'):
        tf.function(call, jit_compile=True)(arguments, DEPTHWISE, implementation="native")


class Placed:
    """A fake tensor for checks of the device placement."""

    def __init__(self, device):
        self.device = f"/job:localhost/replica:0/task:0/device:{device}"


def test_eager_tensors_are_asked_where_they_are(with_gpu):
    assert native.can_use(tensors=[Placed("CPU:0"), None, Placed("CPU:1")])
    assert "CPU only, and this would run on /job" in native.why_not(
        tensors=[Placed("CPU:0"), Placed("GPU:1")]
    )


def test_cuda_kernels_serve_a_gpu(with_cuda):
    assert native.can_use(tensors=[Placed("GPU:0"), Placed("CPU:0")])
    assert native.why_not() == ""
    assert not native.xla_compiles_for_cpu()
    assert "CPUs and NVIDIA GPUs only, and this would run on /job" in native.why_not(
        tensors=[Placed("TPU:0")]
    )


def test_cuda_kernels_for_another_gpu_do_not(with_cuda, monkeypatch):
    monkeypatch.setattr(library, "cuda_problem", lambda framework: "no kernel image is available")
    assert native.why_not(tensors=[Placed("GPU:0")]) == (
        "the CUDA kernels, built for sm_90, cannot run on this GPU (no kernel image is available)"
    )
    assert native.can_use(tensors=[Placed("CPU:0")])


def test_without_them_info_says_how_to_get_them(with_gpu):
    assert native.why_not(tensors=[Placed("GPU:0")]).endswith(
        '"keras-das build --cuda" adds kernels for NVIDIA GPUs'
    )


def test_a_missing_library_is_the_reason_on_a_gpu(with_gpu, monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda framework: "it is Sunday")
    assert native.why_not(tensors=[Placed("GPU:0")]) == "it is Sunday"


# Bitwise equality of all bindings


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(DEPTHWISE, "bfloat16"), (DEPTHWISE, "float32"), (DENSE, "float16"), (DENSE, "float64")],
    ids=str,
)
def test_eager_graph_and_xla_agree_to_the_bit(rng, case, dtype):
    tensors = draw(case, rng, dtype)
    outputs, gradients = run(case, tensors, "eager", implementation="native")
    for mode in ("graph", "xla"):
        others, other_gradients = run(case, tensors, mode, implementation="native")
        np.testing.assert_array_equal(others, outputs, err_msg=mode)
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(other_gradients[name], gradient, err_msg=f"{mode} {name}")


THREADS = """
import hashlib, sys
import numpy as np
import tensorflow as tf

tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
from tests.ops.op_cases import Case, draw
from tests.ops.tf_harness import run

for case in (
    Case("", batch=3, image=(24, 23), channels=20, filters=20, groups=20, padding="same", offset_groups=2),
    Case("", batch=3, image=(24, 23), channels=20, filters=24, groups=2, padding="same"),
):
    tensors = draw(case, np.random.default_rng(int(sys.argv[2])))
    for mode in ("eager", "xla"):
        outputs, gradients = run(case, tensors, mode, implementation="native")
        for name, array in {**gradients, "outputs": outputs}.items():
            print(mode, name, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())
"""


@needs_xla_kernels
def test_any_number_of_threads_gives_the_same_bits(rng):
    seed = rng.integers(2**31)
    alone = run_script(THREADS, 1, seed)
    hashes = [line.split()[-1] for line in alone.splitlines()]
    assert len(hashes) == 24  # 2 cases, 2 modes, and 6 arrays; the modes agree
    assert len(set(hashes)) == 12
    assert run_script(THREADS, 5, seed) == alone


def test_unaligned_tensors(rng):
    """Slices of a tensor share its memory and start at any address."""
    case = Case("", batch=1, image=(5, 7), channels=3, filters=3, kernel_size=(1, 1), groups=3)
    tensors = draw(case, rng)
    padded = {name: np.concatenate([array[:1], array]) for name, array in tensors.items()}
    del padded["kernel"]
    padded["bias"] = tensors["bias"]
    arguments, upstream = split_upstream(
        {name: tf.constant(padded.get(name, tensors[name])) for name in tensors}
    )

    @tf.function
    def compute(arguments, upstream):
        whole = ("kernel", "bias")
        parts = {name: a if name in whole else tf.split(a, 2)[1] for name, a in arguments.items()}
        return value_and_gradients(parts, tf.split(upstream, 2)[1], case=case, implementation="native")

    outputs, gradients = compute(arguments, upstream)
    assert_as_expected(case, tensors, "float32", outputs, gradients)


# Gradients


@pytest.mark.parametrize(
    ("names", "mode"),
    [
        (["offsets"], "eager"),
        (["bias"], "graph"),
        (["bias"], "xla"),
        (["mask", "inputs"], "xla"),
        (["kernel"], "graph"),
    ],
)
def test_gradients_of_some_arguments(rng, names, mode):
    tensors = draw(DEPTHWISE, rng)
    _, whole = run(DEPTHWISE, tensors, implementation="native")
    arguments, upstream = split_upstream(tensors_of(tensors))

    def compute(arguments, upstream):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([arguments[name] for name in names])
            outputs = call(arguments, DEPTHWISE, implementation="native")
        return tape.gradient(outputs, {name: arguments[name] for name in names}, upstream)

    for name, gradient in MODES[mode](compute)(arguments, upstream).items():
        np.testing.assert_array_equal(gradient, whole[name], err_msg=name)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_gradients_through_a_loop(rng, jit_compile):
    case = Case("", filters=4, kernel_size=(1, 2), padding="same")
    arguments, upstream = split_upstream(tensors_of(draw(case, rng, "float64")))

    def compute(arguments, upstream, implementation, loop):
        def step(x):
            return call({**arguments, "inputs": x}, case, implementation=implementation)

        with tf.GradientTape() as tape:
            tape.watch(arguments)
            x = arguments["inputs"]
            if loop:
                (x,) = tf.while_loop(lambda x: True, lambda x: (step(x),), (x,), maximum_iterations=3)
            else:
                x = step(step(step(x)))
        return tape.gradient(x, arguments, upstream)

    looped = tf.function(compute, jit_compile=jit_compile, autograph=False)
    gradients = looped(arguments, upstream, "native", True)
    for name, wanted in compute(arguments, upstream, "reference", False).items():
        np.testing.assert_allclose(gradients[name], wanted, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("batch", [0, 2])
def test_second_order_of_half_types(rng, batch):
    """Each second-order gradient has the dtype of its argument, even for an empty batch."""
    case = Case("", batch=batch, image=(4, 5), kernel_size=(1, 2))
    arguments, upstream = split_upstream(tensors_of(draw(case, rng, "bfloat16")))
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        _, gradients = value_and_gradients(arguments, upstream, case=case, implementation="native")
        product = tf.add_n([tf.reduce_sum(tf.cast(g, "float32") ** 2) for g in gradients.values()])
    seconds = tape.gradient(product, arguments, unconnected_gradients="zero")
    for name, second in seconds.items():
        assert second.dtype == arguments[name].dtype, name
        assert second.shape == arguments[name].shape, name
    assert (np.abs(np.asarray(seconds["kernel"], "float32")).max() > 0) == (batch > 0)


REPLICAS = """
import sys
import keras, numpy as np, tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras_das

rng = np.random.default_rng(0)
images, targets = rng.normal(size=(8, 9, 9, 4)).astype("float32"), rng.normal(size=(8, 7, 7, 3))
weights = {}
for implementation in ("native", "reference"):
    keras.utils.set_random_seed(0)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        model = keras.Sequential([
            keras.Input((9, 9, 4)),
            keras_das.DASLayer(reduction=0.5, implementation=implementation),
            keras_das.DeformableConv2D(3, 3, implementation=implementation),
        ])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(images, targets, batch_size=4, epochs=2, shuffle=False, verbose=0)
    weights[implementation] = model.get_weights()
for one, other in zip(weights["native"], weights["reference"], strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
print("the same")
"""


@pytest.mark.slow
def test_replicas_train_as_with_the_reference():
    assert run_script(REPLICAS).strip().endswith("the same")


# Direct calls of the ops


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def op_arguments(gradient):
    """Valid arguments of the forward or gradient op: a 3x3 kernel, (2, 7, 8, 4) inputs, and six filters."""
    given = {
        "inputs": zeros(2, 7, 8, 4),
        "kernel": zeros(3, 3, 4, 6),
        "offsets": zeros(2, 5, 6, 18),
        "mask": zeros(2, 5, 6, 9),
    }
    given["grad_output" if gradient else "bias"] = zeros(2, 5, 6, 6) if gradient else zeros(6)
    attributes = {
        "strides": [1, 1],
        "dilations": [1, 1],
        "padding": "EXPLICIT",
        "explicit_paddings": [0, 0, 0, 0],
        "offset_groups": 1,
        "has_mask": True,
        "has_bias": True,
    }
    return given, attributes


def call_op(given, attributes, gradient, mode):
    """Calls an op. With `mode` "graph" or "xla", all shapes are unknown until the kernel runs."""
    ops = library.tensorflow_ops()
    op = ops.keras_das_deformable_conv2d_grad if gradient else ops.keras_das_deformable_conv2d
    if mode == "eager":
        return op(**given, **attributes)
    hidden = {name: tf.TensorSpec(None, tensor.dtype) for name, tensor in given.items()}
    return MODES[mode](lambda given: op(**given, **attributes), input_signature=[hidden])(given)


BOTH = {
    "inputs_rank": ({"inputs": zeros(7, 8, 4)}, "`inputs`.*rank 4.*7, 8, 4"),
    "inputs_scalar": ({"inputs": zeros()}, "`inputs`.*rank 4"),
    "kernel_rank": ({"kernel": zeros(3, 3, 4)}, "`kernel`.*rank 4.*3, 3, 4"),
    "kernel_depth": ({"kernel": zeros(3, 3, 3, 6)}, "`kernel`.*3, 3, 3, 6"),
    "kernel_filters": ({"kernel": zeros(3, 3, 1, 6)}, "`kernel`.*3, 3, 1, 6"),
    "kernel_empty": ({"kernel": zeros(0, 3, 4, 6)}, "`kernel`.*0, 3, 4, 6"),
    "kernel_larger": ({"kernel": zeros(9, 3, 4, 6)}, "`kernel`.*9, 3, 4, 6"),
    "channels": ({"inputs": zeros(2, 7, 8, 0)}, "`inputs`.*2, 7, 8, 0"),
    "offsets_rank": ({"offsets": zeros(2, 5, 6)}, r"`offsets`.*\(2, 5, 6, 18\).*\(2, 5, 6\)"),
    "offsets_depth": ({"offsets": zeros(2, 5, 6, 9)}, r"`offsets`.*\(2, 5, 6, 18\).*\(2, 5, 6, 9\)"),
    "offsets_space": ({"offsets": zeros(2, 6, 5, 18)}, r"`offsets`.*\(2, 6, 5, 18\)"),
    "offsets_batch": ({"offsets": zeros(1, 5, 6, 18)}, r"`offsets`.*\(1, 5, 6, 18\)"),
    "offsets_empty": ({"offsets": zeros(0)}, r"`offsets`.*\(0,\)"),
    "mask_depth": ({"mask": zeros(2, 5, 6, 18)}, r"`mask`.*\(2, 5, 6, 9\).*\(2, 5, 6, 18\)"),
    "mask_missing": ({"mask": zeros(0)}, r"`mask`.*\(2, 5, 6, 9\).*\(0,\)"),
    "mask_unasked": ({"has_mask": False}, r"`mask`.*\(0,\).*\(2, 5, 6, 9\)"),
    "strides_one": ({"strides": [1]}, r"`strides`.*2 integers.*\(1,\)"),
    "strides_none": ({"strides": []}, r"`strides`.*2 integers"),
    "strides_zero": ({"strides": [1, 0]}, "`strides`.*positive.*1, 0"),
    "strides_huge": ({"strides": [2**62, 1]}, "`strides`.*4611686018427387904"),
    "dilations_three": ({"dilations": [1, 1, 1]}, r"`dilations`.*2 integers.*\(1, 1, 1\)"),
    "dilations_negative": ({"dilations": [-1, 1]}, "`dilation_rate`.*-1, 1"),
    "dilations_huge": ({"dilations": [2**62, 2**62]}, "`dilation_rate`.*4611686018427387904"),
    "paddings_two": ({"explicit_paddings": [1, 1]}, r"`explicit_paddings`.*4 integers.*\(1, 1\)"),
    "paddings_negative": ({"explicit_paddings": [0, -1, 0, 0]}, "`padding`.*0, -1, 0, 0"),
    "paddings_huge": ({"explicit_paddings": [2**62] * 4}, "`padding`.*4611686018427387904"),
    "padding_name": ({"padding": "FULL"}, "padding"),
    "offset_groups_zero": ({"offset_groups": 0}, "`offset_groups`.*0"),
    "offset_groups_indivisible": ({"offset_groups": 3}, "`offset_groups`.*3"),
}
FORWARD_ONLY = {
    "bias_size": ({"bias": zeros(5)}, r"`bias`.*\(6,\).*\(5,\)"),
    "bias_rank": ({"bias": zeros(1, 6)}, r"`bias`.*\(6,\).*\(1, 6\)"),
    "bias_missing": ({"bias": zeros(0)}, r"`bias`.*\(6,\).*\(0,\)"),
    "bias_unasked": ({"has_bias": False}, r"`bias`.*\(0,\).*\(6,\)"),
}
GRADIENT_ONLY = {
    "grad_output_space": (
        {"grad_output": zeros(2, 7, 8, 6)},
        r"`grad_output`.*\(2, 5, 6, 6\).*\(2, 7, 8, 6\)",
    ),
    "grad_output_depth": ({"grad_output": zeros(2, 5, 6, 4)}, r"`grad_output`.*\(2, 5, 6, 4\)"),
    "grad_output_rank": ({"grad_output": zeros(2, 5, 36)}, r"`grad_output`.*\(2, 5, 36\)"),
}
WRONG = [
    *((f"forward-{name}", False, *wrong) for name, wrong in {**BOTH, **FORWARD_ONLY}.items()),
    *((f"gradient-{name}", True, *wrong) for name, wrong in {**BOTH, **GRADIENT_ONLY}.items()),
]
# All cases run eagerly, and an eighth of them in each graph mode.
WRONG_BY_MODE = {"eager": WRONG, "graph": WRONG[::8], "xla": WRONG[4::8]}


@pytest.mark.parametrize(
    ("gradient", "wrong", "message", "mode"),
    [
        pytest.param(*wrong, mode, id=f"{name}-{mode}", marks=[needs_xla_kernels] if mode == "xla" else [])
        for mode, cases in WRONG_BY_MODE.items()
        for name, *wrong in cases
    ],
)
def test_ops_refuse_by_name(gradient, wrong, message, mode):
    given, attributes = op_arguments(gradient)
    given.update({name: value for name, value in wrong.items() if name in given})
    attributes.update({name: value for name, value in wrong.items() if name in attributes})
    # Errors that are detected while the graph is built are ValueErrors.
    early = () if mode == "eager" else (ValueError,)
    with pytest.raises((tf.errors.InvalidArgumentError, *early)) as caught:
        call_op(given, attributes, gradient, mode)
    assert_matches(message, str(caught.value))


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    ("inputs", "kernel", "message"),
    [("int32", "float32", "int32"), ("float64", "float32", "T=DT_DOUBLE, A=DT_FLOAT")],
)
def test_ops_refuse_dtypes(inputs, kernel, message, gradient, mode):
    given, attributes = op_arguments(gradient)
    given = {name: tf.constant(a, inputs if name == "inputs" else kernel) for name, a in given.items()}
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError, TypeError), match=message):
        call_op(given, attributes, gradient, mode)


def assert_matches(pattern, text):
    assert re.search(pattern, text, re.DOTALL), f"{pattern!r} is not in: {text}"


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("mode", ["eager", "graph", pytest.param("xla", marks=needs_xla_kernels)])
def test_ops_take_what_is_right(gradient, mode):
    given, attributes = op_arguments(gradient)
    outputs = call_op(given, attributes, gradient, mode)
    found = [tensor.shape for tensor in outputs] if gradient else outputs.shape
    kept = [given[name].shape for name in ("inputs", "kernel", "offsets", "mask")]
    assert found == ([*kept, (6,)] if gradient else (2, 5, 6, 6))


UNKNOWN = {
    "all": ({}, (2, 5, 6, 6)),
    "batch": ({"inputs": (None, 7, 8, 4)}, (None, 5, 6, 6)),
    "height": ({"inputs": (2, None, 8, 4)}, (2, None, 6, 6)),
    "space": ({"inputs": (None, None, None, 4)}, (None, None, None, 6)),
    "channels": ({"inputs": (2, 7, 8, None)}, (2, None, None, 6)),
    "inputs": ({"inputs": None}, (None, None, None, 6)),
    "filters": ({"kernel": (3, 3, 4, None)}, (2, None, None, None)),
    "kernel": ({"kernel": None}, (2, None, None, None)),
}


@pytest.mark.parametrize(("hidden", "wanted"), UNKNOWN.values(), ids=UNKNOWN)
def test_shapes_are_inferred(hidden, wanted):
    given, attributes = op_arguments(gradient=False)
    shapes = {name: hidden.get(name, tensor.shape) for name, tensor in given.items()}
    signature = {name: tf.TensorSpec(shape, "float32") for name, shape in shapes.items()}
    op = library.tensorflow_ops().keras_das_deformable_conv2d
    traced = tf.function(lambda given: op(**given, **attributes), input_signature=[signature])
    assert traced.get_concrete_function().output_shapes.as_list() == list(wanted)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ({"offsets": (None, None, None, 9)}, r"`offsets`.*\(2, 5, 6, 18\).*\(\?, \?, \?, 9\)"),
        ({"inputs": (None, None, 8, 4), "mask": (2, 5, 7, 9)}, r"`mask`.*\(\?, \?, 6, 9\).*\(2, 5, 7, 9\)"),
        ({"inputs": (2, None, 2, 4)}, "`kernel`.*not be larger"),
        ({"inputs": None, "bias": (5,)}, r"`bias`.*\(6,\).*\(5,\)"),
        ({"inputs": (None, 8, 4)}, "`inputs`.*rank 4"),
        ({"inputs": (None, None, None, 6)}, "`kernel`"),
    ],
)
def test_graphs_refuse_what_they_can_see(hidden, message):
    given, attributes = op_arguments(gradient=False)
    shapes = {name: hidden.get(name, tensor.shape) for name, tensor in given.items()}
    signature = {name: tf.TensorSpec(shape, "float32") for name, shape in shapes.items()}
    op = library.tensorflow_ops().keras_das_deformable_conv2d
    traced = tf.function(lambda given: op(**given, **attributes), input_signature=[signature])
    with pytest.raises(ValueError, match=message):
        traced.get_concrete_function()


# Exports


@pytest.mark.parametrize(
    ("how", "implementation"), [("keras_das.export", "native"), ("model.export", "auto")]
)
def test_exports_hold_no_kernel(rng, tmp_path, how, implementation, monkeypatch):
    if how == "keras_das.export":  # does not depend on recognizing the exporter
        monkeypatch.setattr(native, "_EXPORTERS", ("nothing of this name",))
    layer = keras_das.DeformableConv2D(
        3, (1, 2), offset_initializer="random_normal", implementation=implementation
    )
    model = keras.Sequential([keras.Input((None, None, 4)), layer])
    images = rng.normal(size=(2, 8, 7, 4)).astype("float32")
    wanted = model.predict(images, verbose=0)  # traces the model with the kernels
    if how == "model.export":
        model.export(str(tmp_path / "model"), verbose=False)
    else:
        keras_das.export(model, tmp_path / "model")
    assert custom_operations(tmp_path / "model") == []
    served = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(served.serve(images), wanted, rtol=1e-5, atol=1e-6)
    assert operations(lambda: call_layer(model, images)) >= {FORWARD}  # the kernels are used again


def custom_operations(folder):
    return saved_model.custom_operations(folder)


def call_layer(model, images):
    return model(tf.constant(images))


def operations(function):
    """The types of all operations in a graph of `function`."""
    graph = tf.function(function, autograph=False).get_concrete_function().graph
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return {node.op for node in nodes}


def test_portable_is_a_thread_s_own(rng):
    arguments, _ = split_upstream(tensors_of(draw(DEPTHWISE, rng)))
    found = {}

    def look(name):
        found[name] = FORWARD in operations(lambda: call(arguments, DEPTHWISE, implementation="native"))

    with native.portable():
        look("within")
        other = threading.Thread(target=look, args=("elsewhere",))
        other.start()
        other.join()
        with native.portable():
            pass
        look("still within")
    look("after")
    assert found == {"within": False, "elsewhere": True, "still within": False, "after": True}


def test_portable_ends_with_an_error():
    def leave():
        with native.portable():
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert not native.must_be_portable([])


# Graphs with kernels that other processes load


LOAD_IN_ANOTHER_PROCESS = """
import sys

import numpy as np
import tensorflow as tf

import keras_das

folder, register = sys.argv[1:]
if register == "True":
    keras_das.load_ops()
    keras_das.load_ops()
images = tf.Variable(np.load(f"{folder}/images.npy"))
with tf.GradientTape() as tape:
    loaded = tf.saved_model.load(f"{folder}/model")
    (outputs,) = loaded.signatures["serving_default"](image=images.read_value()).values()
print(np.abs(outputs - np.load(f"{folder}/outputs.npy")).max() < 1e-5)
print(tape.gradient(outputs, images).shape)
"""


def test_operations_are_registered_before_loading(rng, tmp_path):
    layer, images = keras_das.DeformableConv2D(2, 2), rng.normal(size=(2, 4, 4, 3)).astype("float32")
    outputs, module = layer(images), tf.Module()
    module.weights = [variable.value for variable in layer.variables]
    serve = tf.function(layer).get_concrete_function(tf.TensorSpec(images.shape, name="image"))
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=serve)
    assert saved_model.custom_operations(tmp_path / "model") == [FORWARD]
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "outputs.npy", outputs.numpy())
    without, with_them = (
        processes.python(LOAD_IN_ANOTHER_PROCESS, tmp_path, register) for register in (False, True)
    )
    assert f"Op type not registered '{FORWARD}'" in without.stderr
    assert with_them.stdout.split("\n")[:2] == ["True", "(2, 4, 4, 3)"], with_them.stderr
