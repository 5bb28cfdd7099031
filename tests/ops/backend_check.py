"""The op on whichever Keras backend is chosen, through that backend's own autodiff.

    KERAS_BACKEND=jax python -m pytest tests/ops/backend_check.py

pytest does not collect this file by itself; `test_backends.py` runs it for JAX.
"""

import functools

import keras
import numpy as np
import pytest

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
    """Gradients by `jax.vjp`, compiled or not; compiled is the quicker of the two for a single call."""

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
    """Gradients by `tf.GradientTape`; the other test modules go further."""

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


# Keras' result type of float64 is float32, but under TensorFlow.
PRECISIONS = [dtype for dtype in DTYPES if keras.backend.result_type(dtype, dtype) == dtype]
AUTODIFF = {"jax": Jax, "torch": Torch, "tensorflow": TensorFlow}[BACKEND]()


def to_numpy(tensor):
    """Any backend's tensor; NumPy has no bfloat16 of torch's."""
    if BACKEND == "torch" and "bfloat16" in str(tensor.dtype):
        return tensor.float().numpy()
    return np.asarray(tensor)


def to_tensors(arrays, data_format="channels_last"):
    return {name: to_tensor(to_layout(name, array, data_format)) for name, array in arrays.items()}


def to_tensor(array):
    """A tensor of the array's dtype, by way of float32: torch reads no bfloat16 of NumPy's."""
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
    [(case, DATA_FORMATS[number % 2]) for number, case in enumerate(COMPILED_CASES)],
    ids=str,
)
def test_values_and_gradients(rng, case, data_format, implementation):
    check(case, draw(case, rng), "float32", AUTODIFF.modes[0], data_format, implementation)


@pytest.mark.parametrize("mode", AUTODIFF.modes)
@pytest.mark.parametrize(
    ("dtype", "data_format"),
    [(dtype, DATA_FORMATS[number % 2]) for number, dtype in enumerate(PRECISIONS)],
)
def test_dtypes(rng, dtype, mode, data_format, implementation):
    case = Case("", kernel_size=(1, 2), groups=2, offset_groups=2, padding="same", strides=2)
    check(case, draw(case, rng, dtype), dtype, mode, data_format, implementation)


def test_second_order_gradients(rng, implementation):
    """Against finite differences of the oracle's gradients, in the direction of `directions`."""
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
        if second is not None:  # TensorFlow's way to say zero
            assert relative_error(to_numpy(second), wanted) < 1e-5, name


def test_borders_and_bad_numbers(rng, implementation):
    """Whole pixels, both edges, far away and NaN, in one image."""
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
    """What a result's dtype follows from."""
    case = Case("", kernel_size=(1, 1), modulated=False, use_bias=False)
    shapes = case.shapes
    arguments = {name: np.zeros(shapes[name], "float32") for name in ("inputs", "kernel", "offsets")}
    arguments["inputs"] = arguments["inputs"].astype(numpy_dtype("float16"))
    outputs = call(arguments, case)
    assert keras.backend.standardize_dtype(outputs.dtype) == keras.backend.result_type("float16", "float32")
