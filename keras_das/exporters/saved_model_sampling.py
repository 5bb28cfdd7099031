"""Deformable convolution by TensorFlow's `crop_and_resize`, for SavedModels.

`crop_and_resize` interpolates in one operation and is faster than the reference's gathers. It is a standard
operation of TensorFlow, but XLA and LiteRT do not support it. Positions are relative to the size of the
image, in float32.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_das.ops import native, reference
from keras_das.ops.geometry import Geometry

Tensor = Any


def deformable_conv2d(
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    dtype: str,
) -> Tensor:
    """Computes what `reference.deformable_conv2d` computes, with the same arguments.

    The reference computes float64, several offset groups, and what XLA compiles.
    """
    if dtype == "float64" or geometry.offset_groups > 1 or native.tensorflow_in_xla():
        return reference.deformable_conv2d(inputs, kernel, offsets, mask, bias, geometry, dtype)
    import tensorflow as tf

    frame = reference.Frame(inputs, geometry, "float32")
    batch, height, width = grid = frame.grid[:3]
    # One pixel of zeros on each side, towards which samples on the border are interpolated.
    padded = ops.pad(ops.cast(inputs, frame.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    image = ops.repeat(ops.arange(batch, dtype="int32"), height * width)
    kernel = ops.reshape(kernel, (geometry.taps, *kernel.shape[2:]))
    boxes, factors = _locate(frame, offsets, mask)

    def add_tap(tap: Tensor, output: Tensor) -> tuple[Tensor]:
        samples = tf.image.crop_and_resize(padded, tf.gather(boxes, tap), image, (1, 1))
        samples = ops.reshape(samples, frame.columns_shape) * tf.gather(factors, tap)
        return (
            output + reference.apply_kernel(samples, reference.at_tap(frame, kernel, tap), geometry.groups),
        )

    (output,) = reference.over_taps(frame, add_tap, ops.zeros((*grid, kernel.shape[-1]), dtype=frame.dtype))
    if bias is not None:
        output = output + ops.cast(bias, frame.dtype)
    return ops.cast(output, dtype)


def _locate(frame: reference.Frame, offsets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The positions of all samples, as boxes `(taps, N * Ho * Wo, 4)`, and their factors
    `(taps, N, Ho, Wo, 1)`: the mask, or NaN where the offset is NaN.
    """
    geometry, taps, grid = frame.geometry, frame.geometry.taps, frame.grid[:3]
    offsets = ops.reshape(ops.cast(offsets, frame.dtype), (*grid, taps, 2))
    offset_y, offset_x = ops.unstack(ops.transpose(offsets, (4, 3, 0, 1, 2)), 2)
    tap = np.arange(taps)
    y, inside_y = _relative(_resting(frame, tap // geometry.columns.kernel, 1) + offset_y, frame.height)
    x, inside_x = _relative(_resting(frame, tap % geometry.columns.kernel, 2) + offset_x, frame.width)
    # Samples outside the image read the corner of the padding. A NaN is not inside.
    inside = ops.logical_and(inside_y, inside_x)
    y, x = (ops.where(inside, position, ops.zeros_like(position)) for position in (y, x))
    boxes = ops.reshape(ops.stack([y, x, y, x], axis=-1), (taps, -1, 4))
    if mask is None:
        factor = ops.ones_like(y)
    else:
        factor = ops.transpose(ops.reshape(ops.cast(mask, frame.dtype), (*grid, taps)), (3, 0, 1, 2))
    is_nan = ops.logical_or(ops.isnan(offset_y), ops.isnan(offset_x))
    factor = ops.where(is_nan, ops.full_like(factor, float("nan")), factor)
    return boxes, ops.expand_dims(factor, -1)


def _resting(frame: reference.Frame, k: np.ndarray, axis: int) -> Tensor:
    """The positions at offset zero of the taps with index `k` along an axis of the grid."""
    window = frame.geometry.rows if axis == 1 else frame.geometry.columns
    first = ops.arange(frame.grid[axis]) * window.stride - frame.margins[axis - 1]
    shifts = (k * window.dilation).astype(frame.dtype)
    resting = ops.cast(first, frame.dtype) + ops.reshape(shifts, (len(k), 1))
    return ops.expand_dims(ops.expand_dims(resting, 1), 4 - axis)


def _relative(position: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """Pixels as fractions of the padded image, and whether they are inside."""
    size = ops.cast(size, position.dtype)
    inside = ops.logical_and(position > -1, position < size)
    return (position + 1) / (size + 1), inside
