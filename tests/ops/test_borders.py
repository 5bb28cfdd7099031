"""Tests of the op at image borders, at whole pixels, and with non-finite numbers."""

import functools

import numpy as np
import pytest

from tests.ops.op_cases import (
    GRADIENT_BOUND,
    VALUE_BOUND,
    Case,
    call,
    draw,
    expected,
    relative_error,
    split_upstream,
)
from tests.ops.tf_harness import run, runner

STEP = 1e-4  # less than the distance from any coordinate below to the next discontinuity
SIZE = 13
COORDINATES = np.array(
    [-2, -1.01, -1, -0.99, -0.01, 0, 0.01, 5.5, SIZE - 1.01, SIZE - 1, SIZE - 0.5, SIZE, SIZE + 0.01]
)
# Each output pixel samples one position: row i at COORDINATES[i], column j at COORDINATES[j].
GRID = Case("", batch=1, image=(SIZE, SIZE), channels=2, filters=2, kernel_size=(1, 1))


def grid_tensors(rng):
    """Random tensors with offsets that move output pixel (i, j) to (COORDINATES[i], COORDINATES[j])."""
    tensors = draw(GRID, rng, "float64")
    to = COORDINATES - np.arange(SIZE)
    tensors["offsets"] = np.stack(np.meshgrid(to, to, indexing="ij"), axis=-1)[None]
    return tensors


def off_image():
    """A mask of shape (SIZE, SIZE) that is true where the sample of an output pixel is out of bounds."""
    off = (COORDINATES <= -1) | (COORDINATES >= SIZE)
    return off[:, None] | off[None, :]


def forward(tensors, implementation):
    arguments, _ = split_upstream(tensors)
    return call(arguments, GRID, implementation=implementation).numpy()


def test_off_image_is_exactly_zero(rng, implementation):
    tensors = grid_tensors(rng)
    bias = tensors["bias"]
    outputs, gradients = run(GRID, tensors, implementation=implementation)
    np.testing.assert_array_equal(outputs[0][off_image()], np.broadcast_to(bias, (off_image().sum(), 2)))
    assert np.all(outputs[0][~off_image()] != bias)
    for name in ("offsets", "mask"):
        np.testing.assert_array_equal(gradients[name][0][off_image()], 0)


def test_offset_gradients_are_right_hand_slopes(rng, implementation):
    """Covers whole pixels and both borders. The gradients are zero out of bounds, including at -1 itself."""
    tensors = grid_tensors(rng)
    _, gradients = run(GRID, tensors, implementation=implementation)
    start = forward(tensors, implementation)
    for axis in (0, 1):
        moved = dict(tensors, offsets=tensors["offsets"] + STEP * np.eye(2)[axis])
        rise = (forward(moved, implementation) - start) * tensors["outputs"]
        slope = np.where(off_image(), 0, rise.sum(-1)[0] / STEP)
        np.testing.assert_allclose(gradients["offsets"][0, ..., axis], slope, atol=1e-9)


def test_gradients_across_the_edge_are_the_oracles(rng, implementation):
    tensors = grid_tensors(rng)
    _, gradients = run(GRID, tensors, implementation=implementation)
    _, wanted = expected(GRID, tensors)
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted[name]) <= 1e-12, name


FAR = [1e30, 3e38, -1e9, -3e38, 2.0**31, -(2.0**63), np.inf, -np.inf]

SMALL = {"image": (5, 6), "filters": 4, "kernel_size": (1, 2), "padding": "same", "offset_groups": 2}
DEPTHWISE, DENSE = Case("depthwise", groups=4, **SMALL), Case("dense", **SMALL)
everywhere = pytest.mark.parametrize(
    ("case", "mode"), [(DEPTHWISE, "eager"), (DENSE, "eager"), (DEPTHWISE, "xla")], ids=str
)
compiled_once = functools.cache(runner)  # shared by all tests


@pytest.mark.parametrize(
    ("case", "mode", "dtype"),
    [
        (DEPTHWISE, "eager", "bfloat16"),
        (DEPTHWISE, "eager", "float32"),
        (DENSE, "eager", "float32"),
        (DENSE, "eager", "float64"),
        (DEPTHWISE, "xla", "float64"),
    ],
    ids=str,
)
def test_far_away_is_zero(rng, case, mode, dtype, implementation):
    tensors = draw(case, rng, dtype)
    far = rng.uniform(size=tensors["offsets"].shape) < 0.3
    tensors["offsets"][far] = rng.choice(FAR, size=far.sum())
    outputs, gradients = compiled_once(case, mode, implementation=implementation)(tensors)
    wanted, wanted_gradients = expected(case, tensors)
    assert relative_error(outputs, wanted) <= VALUE_BOUND[dtype]
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted_gradients[name]) <= GRADIENT_BOUND[dtype], name
    off = far.reshape(*far.shape[:3], 4, 2).any(-1)
    np.testing.assert_array_equal(gradients["mask"][off], 0)
    np.testing.assert_array_equal(gradients["offsets"].reshape(*far.shape[:3], 4, 2)[off], 0)


@everywhere
def test_nan_offsets_give_nan_there_and_nowhere_else(rng, case, mode, implementation):
    """The filters of the offset group become NaN, even if the other coordinate is far out of bounds."""
    tensors = draw(case, rng, "float64")
    for index in ((0, 0, 0, 0), (0, 2, 3, 1), (1, 1, 1, 7), (1, 4, 2, 4)):
        tensors["offsets"][index] = np.nan
    tensors["offsets"][0, 0, 0, 1] = 1e30
    outputs, gradients = compiled_once(case, mode, implementation=implementation)(tensors)
    wanted, _ = expected(case, tensors)
    assert np.isnan(wanted).sum() == (8 if case is DEPTHWISE else 16)
    compare_where_finite(outputs, wanted, "outputs")
    # The NaN in pixel (1, 1) of the second image affects no channels of the other offset group.
    assert np.all(np.isfinite(gradients["bias"]))
    hurt = np.isnan(wanted).any(-1)
    assert np.all(np.isfinite(gradients["offsets"][~hurt]))
    assert np.all(np.isfinite(gradients["mask"][~hurt]))


@everywhere
def test_bad_pixels_stay_where_they_are_read(rng, case, mode, implementation):
    """Values at the corners, where clipped indices point, must not affect samples out of bounds."""
    tensors = draw(case, rng, "float64", generic=True)
    for bad in (np.nan, np.inf, -np.inf):
        for row, column in ((0, 0), (0, 5), (4, 0), (4, 5), (2, 2)):
            tensors["inputs"][:, row, column] = bad
        outputs, gradients = compiled_once(case, mode, implementation=implementation)(tensors)
        with np.errstate(invalid="ignore"):
            wanted, wanted_gradients = expected(case, tensors)
        assert 0 < np.isfinite(wanted).mean() < 1
        compare_where_finite(outputs, wanted, "outputs")
        for name in ("inputs", "offsets", "mask"):
            compare_where_finite(gradients[name], wanted_gradients[name], name)


def compare_where_finite(actual, wanted, name, bound=1e-12):
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(actual), finite, err_msg=name)
    assert relative_error(actual[finite], wanted[finite]) <= bound, name


@everywhere
def test_an_image_of_nan_is_not_seen_from_outside(rng, case, mode, implementation):
    tensors = draw(case, rng, "float64")
    tensors["inputs"][:] = np.nan
    tensors["offsets"][:] = rng.choice([-100, 100, -1e30, np.inf], size=tensors["offsets"].shape)
    outputs, gradients = compiled_once(case, mode, implementation=implementation)(tensors)
    np.testing.assert_array_equal(outputs, np.broadcast_to(tensors["bias"], outputs.shape))
    for name in ("inputs", "kernel", "offsets", "mask"):
        np.testing.assert_array_equal(gradients[name], 0, err_msg=name)
