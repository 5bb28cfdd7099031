"""Deformable convolution by TensorFlow's `crop_and_resize`, for SavedModels.

`crop_and_resize` interpolates in one operation and is faster than the reference's gathers. It is a standard
operation of TensorFlow, but XLA and LiteRT do not support it. Positions are relative to the size of the
image, in float32.
"""

from typing import Any

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
    frame = reference.Frame(inputs, geometry, "float32")
    taps, grid = geometry.taps, frame.grid[:3]
    # One pixel of zeros on each side, towards which samples on the border are interpolated.
    padded = ops.pad(ops.cast(inputs, frame.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = ops.reshape(kernel, (taps, *kernel.shape[2:]))
    offsets = ops.transpose(ops.reshape(offsets, (*grid, taps, 2)), (3, 4, 0, 1, 2))
    if mask is not None:
        mask = ops.transpose(ops.reshape(mask, (*grid, taps)), (3, 0, 1, 2))

    def add_tap(tap: Tensor, output: Tensor) -> tuple[Tensor]:
        offset = ops.cast(ops.take(offsets, tap, axis=0), frame.dtype)
        columns = _sample(frame, padded, offset, reference.at_tap(frame, mask, tap), tap)
        return (
            output + reference.apply_kernel(columns, reference.at_tap(frame, kernel, tap), geometry.groups),
        )

    (output,) = reference.over_taps(frame, add_tap, ops.zeros((*grid, kernel.shape[-1]), dtype=frame.dtype))
    if bias is not None:
        output = output + ops.cast(bias, frame.dtype)
    return ops.cast(output, dtype)


def _sample(
    frame: reference.Frame, padded: Tensor, offset: Tensor, mask: Tensor | None, tap: Tensor
) -> Tensor:
    """The samples of one tap, multiplied by its mask: `(N, Ho, Wo, C)`."""
    import tensorflow as tf

    batch, height, width = frame.grid[:3]
    columns = frame.geometry.columns.kernel
    (y, inside_y), (x, inside_x) = (
        _relative(reference.resting_position(frame, k, axis)[..., 0] + offset[axis - 1], size)
        for k, axis, size in ((tap // columns, 1, frame.height), (tap % columns, 2, frame.width))
    )
    # Samples outside the image read the corner of the padding. A NaN is not inside.
    inside = ops.logical_and(inside_y, inside_x)
    y, x = (ops.where(inside, position, ops.zeros_like(position)) for position in (y, x))
    boxes = ops.reshape(ops.stack([y, x, y, x], axis=-1), (-1, 4))
    image = ops.repeat(ops.arange(batch, dtype="int32"), height * width)
    samples = tf.image.crop_and_resize(padded, boxes, image, (1, 1))
    samples = ops.reshape(samples, frame.columns_shape)
    is_nan = ops.logical_or(ops.isnan(offset[0]), ops.isnan(offset[1]))
    factor = ops.ones_like(y) if mask is None else mask
    factor = ops.where(is_nan, ops.full_like(factor, float("nan")), factor)
    return samples * ops.expand_dims(factor, -1)


def _relative(position: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """Pixels as fractions of the padded image, and whether they are inside."""
    size = ops.cast(size, position.dtype)
    inside = ops.logical_and(position > -1, position < size)
    return (position + 1) / (size + 1), inside
