"""Tests of the oracle: manual calculations, ordinary convolutions, and finite differences."""

import keras
import ml_dtypes
import numpy as np
import pytest

from tests import oracle
from tests.ops.op_cases import CASES, Case, assert_as_expected, draw, expected, relative_error, split_upstream


def read_one(y, x, image=((1.0, 2.0), (3.0, 5.0))):
    """Reads (y, x) of a one-channel image at output pixel (0, 0), with a 1x1 kernel of weight 1."""
    image = np.reshape(image, (1, 2, 2, 1))
    offsets = np.full((1, 2, 2, 2), 100.0)
    offsets[0, 0, 0] = y, x
    return oracle.deformable_conv2d(image, np.ones((1, 1, 1, 1)), offsets)[0, 0, 0, 0]


@pytest.mark.parametrize(
    ("y", "x", "value"),
    [
        (0, 0, 1),
        (0, 1, 2),
        (1, 0, 3),
        (0.5, 0.5, 2.75),
        (0.25, 1, 2.75),
        (-0.5, 0, 0.5),
        (1.5, 1.5, 1.25),
        (-1, 0, 0),
        (0, 2, 0),
        (1e30, 0, 0),
        (-np.inf, 0, 0),
        (np.nan, 0, np.nan),
        (50, np.nan, np.nan),
    ],
)
def test_reads_what_a_hand_computes(y, x, value):
    np.testing.assert_allclose(read_one(y, x), value)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), ((2, 2), 1), (1, 2), (1, (1, 2))])
@pytest.mark.parametrize("image", [(7, 8), (5, 9)])
def test_at_rest_it_is_a_convolution(rng, padding, strides, dilation, image):
    case = Case("", image=image, strides=strides, padding=padding, dilation_rate=dilation, modulated=False)
    arguments, _ = split_upstream(draw(case, rng, "float64"))
    arguments["offsets"][:] = 0
    wanted = keras.ops.conv(
        arguments["inputs"], arguments["kernel"], strides, padding, "channels_last", dilation
    )
    actual = oracle.deformable_conv2d(**arguments, **case.options)
    assert relative_error(actual, wanted + arguments["bias"]) < 1e-13


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_gradients_are_slopes(rng, case):
    tensors = draw(case, rng, "float64", generic=True)
    arguments, upstream = split_upstream(tensors)
    _, gradients = expected(case, tensors)
    for name, gradient in gradients.items():
        direction = rng.uniform(-1, 1, size=gradient.shape)

        def loss(step, name=name, direction=direction):
            moved = {**arguments, name: arguments[name] + step * direction}
            return np.sum(upstream * oracle.deformable_conv2d(**moved, **case.options))

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        scale = np.abs(gradient * direction).sum() + 1e-3
        assert abs(slope - np.sum(gradient * direction)) < 1e-7 * scale, name


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_naive_is_rough_but_right(rng, dtype):
    case = Case("", padding="same")
    arguments, _ = split_upstream(draw(case, rng, dtype.__name__))
    naive = oracle.naive_lowprec(**arguments, **case.options, dtype=dtype)
    assert naive.dtype == dtype
    error = relative_error(naive, oracle.deformable_conv2d(**arguments, **case.options))
    assert 0 < error < 20 * ml_dtypes.finfo(dtype).eps


def test_bounds_of_a_sum_that_cancels(rng):
    case = Case("", filters=1)
    tensors = draw(case, rng)
    tensors["outputs"] -= tensors["outputs"].mean()
    outputs, gradients = expected(case, tensors)
    assert np.abs(gradients["bias"]) < 1e-5
    assert_as_expected(case, tensors, "float32", outputs, {**gradients, "bias": gradients["bias"] + 1e-5})
    with pytest.raises(AssertionError, match="'bias'"):
        assert_as_expected(case, tensors, "float32", outputs, {**gradients, "bias": gradients["bias"] + 1e-2})


def test_das_gate_shapes_and_range(rng):
    weights = {
        "reduce_depthwise": rng.normal(size=(3, 3, 1, 5)),
        "reduce_pointwise": rng.normal(size=(1, 1, 5, 2)),
        "offsets_kernel": rng.normal(size=(3, 3, 2, 18)),
        "mask_kernel": rng.normal(size=(3, 3, 2, 9)),
        "deform_kernel": rng.normal(size=(3, 3, 1, 2)),
        "pointwise": rng.normal(size=(1, 1, 2, 5)),
        "layer_scale": rng.normal(size=5),
    }
    inputs = rng.normal(size=(2, 4, 5, 5))
    outputs, gate = oracle.das_gate(inputs, weights)
    np.testing.assert_allclose(outputs, inputs * gate)
    assert outputs.shape == inputs.shape
    assert np.all((gate > 0) & (gate < 1))
    # With a layer norm scale of zero, twice the sigmoid is exactly one, and the gate is the identity.
    outputs, _ = oracle.das_gate(inputs, {**weights, "layer_scale": np.zeros(5)}, gate_scale=2.0)
    np.testing.assert_array_equal(outputs, inputs)
