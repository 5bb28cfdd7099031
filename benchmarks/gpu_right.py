"""Verifies results for gpu_report.py: `python gpu_right.py NAME DEVICE RESULT`.

A check that fails ends with a traceback and writes no RESULT.
"""

import functools
import pathlib
import sys
from typing import Any

import numpy as np
from tests.ops import op_cases, random_cases

import harness
from bench_model import BOUND
from problem import largest_error

Result = dict[str, Any]
_RANDOM = {
    "eager": 400,
    "graph": 8,
    "xla": 16,
    "jax": 16,
}  # random problems on a GPU; a CPU gets a hundredth, and one more


def op(device: str) -> Result:
    """The TensorFlow op, eagerly and in graphs, and layers called eagerly."""
    _require("tensorflow", device)
    return {**kernels("eager", device), **kernels("graph", device), **layers()}


def xla(device: str) -> Result:
    """The op in XLA programs, forward and backward."""
    _require("tensorflow", device)
    return kernels("xla", device)


def jax(device: str) -> Result:
    """The kernels through `jax.ffi`, forward and backward."""
    _require("jax", device)
    return kernels("jax", device)


def kernels(binding: str, device: str) -> Result:
    """Values and gradients against the float64 oracle: all dtypes, both data formats, and random problems."""
    rng = np.random.default_rng(0)
    chosen = op_cases.in_turns(op_cases.CASES if binding == "eager" else op_cases.COMPILED_CASES)
    if device == "cpu":
        chosen = chosen[:2]
    count = _RANDOM[binding] if device == "gpu" else 1 + _RANDOM[binding] // 100
    chosen += [(random_cases.random_case(rng), op_cases.DTYPES[n % 4], "channels_last") for n in range(count)]
    compute, wrong = random_cases.function_of(binding), []
    for case, dtype, data_format in chosen:
        try:
            _hold(compute, case, dtype, data_format, rng)
        except Exception as error:  # any error of a framework; the other problems still run
            wrong.append(f"{case!r}, {dtype}, {data_format}: {harness.in_one_line(error)}")
    if wrong:
        wrong.append(f"{binding}: {len(wrong)} of {len(chosen)} problems are wrong")
        raise AssertionError("\n".join(wrong))
    return {binding: f"{len(chosen)} problems"}


def _hold(compute, case, dtype, data_format, rng) -> None:
    """Compares one problem's outputs and gradients with the oracle's."""
    tensors = op_cases.draw(case, rng, dtype)
    given = {name: op_cases.to_layout(name, array, data_format) for name, array in tensors.items()}
    arguments, upstream = op_cases.split_upstream(given)
    outputs, gradients = compute(arguments, upstream, **case.options, data_format=data_format)
    back = {name: op_cases.from_layout(name, array, data_format) for name, array in gradients.items()}
    outputs = op_cases.from_layout("outputs", outputs, data_format)
    op_cases.assert_as_expected(case, tensors, dtype, outputs, back)


def layers() -> Result:
    """Outputs and gradients of eager layers agree with those of the reference implementation."""
    import keras_das

    images = np.random.default_rng(0).normal(size=(2, 9, 8, 32)).astype("float32")
    made = {
        "DASLayer": functools.partial(keras_das.DASLayer, reduction=0.5),
        "DeformableConv2D": functools.partial(
            keras_das.DeformableConv2D, 8, 3, offset_initializer="random_normal"
        ),
    }
    errors = {}
    for name, make in made.items():
        for policy, bound in BOUND.items():
            found, wanted = (
                _outputs_and_gradients(functools.partial(make, dtype=policy, implementation=way), images)
                for way in ("native", "reference")
            )
            errors[f"{name} {policy}"] = error = largest_error(found, wanted)
            if not error <= bound:
                raise AssertionError(f"{name}, {policy}: an error of {error:.1e}, more than {bound:.0e}")
    return {"layers": f"at most {max(errors.values()):.1e} from the reference"}


def _outputs_and_gradients(make, images) -> list[np.ndarray]:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layer = make()
    with tf.GradientTape() as tape:
        outputs = layer(images)
        loss = tf.reduce_sum(tf.cast(outputs, "float32") ** 2)
    gradients = tape.gradient(loss, layer.trainable_variables)
    # Some gradients are zero up to rounding, so errors are relative to the largest gradient.
    flat = np.concatenate([np.ravel(np.asarray(g, "float64")) for g in gradients])
    return [np.asarray(outputs, "float64"), flat]


def training(policy: str, device: str) -> Result:
    """Three training steps of a ResNet with gates, compiled by XLA."""
    import keras

    _require("tensorflow", device)
    keras.config.set_dtype_policy(policy)
    size, batch = (64, 32) if device == "gpu" else (32, 4)
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(0, 255, (batch, size, size, 3)).astype("float32"), np.arange(batch) % 10
    model, twin = (_classifier(size, device, implementation) for implementation in ("native", "reference"))
    twin.set_weights(model.get_weights())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wanted = float(loss(labels, twin(images, training=True)))
    optimizer = keras.optimizers.SGD(0.01)
    if policy == "mixed_float16":  # the default initial scale can overflow in the first steps
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256)
    model.compile(optimizer, loss, jit_compile=True)
    before = _offset_kernels(model)
    losses = [float(model.train_on_batch(images, labels)) for _ in range(3)]
    error = abs(losses[0] - wanted) / wanted
    if not error <= BOUND[policy]:
        raise AssertionError(f"the first loss is {losses[0]}, but {wanted} with the reference")
    if not np.isfinite(losses).all():
        raise AssertionError(f"losses are not finite: {losses}")
    for old, new in zip(before, _offset_kernels(model), strict=True):
        if not (np.isfinite(new).all() and np.any(old != new)):
            raise AssertionError("the offset kernel of a gate is unchanged or not finite")
    return {"losses": [round(value, 4) for value in losses], "on the reference": round(wanted, 4)}


def _classifier(size: int, device: str, implementation: str):
    import keras
    import keras_das

    keras.utils.set_random_seed(0)
    backbone, stages = _resnet18(size) if device == "gpu" else _two_convolutions(size)
    # The paper's gate: a gate of exactly 1 (`identity_init`) would hide errors of the convolution.
    gated = keras_das.attach_das(backbone, stages, identity_init=False, implementation=implementation)
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(gated(x))
    return keras.Model(inputs, keras.layers.Dense(10, dtype="float32")(x))


def _resnet18(size: int):
    from examples import backbones

    found = backbones.build("resnet18", size, pretrained=False)
    return found.model, found.stages


def _two_convolutions(size: int):
    """A network that XLA compiles in seconds, for a rehearsal."""
    import keras

    layers = [keras.layers.Conv2D(16, 3, 2, activation="relu", name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((size, size, 3)), *layers])
    return model, ["first", "second"]


def _offset_kernels(model) -> list[np.ndarray]:
    import keras_das

    layers = model._flatten_layers()
    return [np.copy(x.offset_kernel.numpy()) for x in layers if isinstance(x, keras_das.DeformableConv2D)]


def determinism(device: str) -> Result:
    """Repeated runs give the same bits under op determinism."""
    from tests.ops import determinism

    _require("tensorflow", device)
    found = determinism.hashes(*((32, 5) if device == "gpu" else (8, 2)))
    if differing := [problem for problem, bits in found.items() if len(bits) > 1]:
        raise AssertionError(f"results differ from run to run: {differing}")
    return {"problems": list(found)}


def _require(framework: str, device: str) -> None:
    """Raises `RuntimeError` unless the kernels are available on the device."""
    from keras_das.kernels import library

    if framework == "tensorflow":
        import tensorflow as tf

        # Matrix products in TF32 are beyond the oracle's bounds.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        seen = bool(tf.config.list_physical_devices("GPU"))
    else:
        import jax

        seen = jax.default_backend() == "gpu"
    reason = library.why_not(framework)
    if device == "gpu" and not reason:
        reason = library.cuda_problem(framework) if seen else f"{framework} sees no GPU"
        if not library.cuda_architectures(framework):
            reason = 'the kernels are built for the CPU alone: run "keras-das build --cuda"'
    if reason:
        raise RuntimeError(reason)


CHECKS = {
    "xla": xla,
    "op": op,
    **{f"training-{policy}": functools.partial(training, policy) for policy in BOUND},
    "determinism": determinism,
    "jax": jax,
}

if __name__ == "__main__":
    check, on, result = sys.argv[1:]
    harness.write_json(pathlib.Path(result), CHECKS[check](on))
