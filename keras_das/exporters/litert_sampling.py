"""Depthwise deformable convolution as one lookup and one batched product, for LiteRT.

LiteRT runs the reference's loop slowly, because it has no fast kernels for loops, and for shapes that it does
not know in advance. Here, the image is multiplied by the kernel first, once for each tap. One lookup then
reads the corners of all samples, and one product for each output position weights and adds them.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_das.ops import reference
from keras_das.ops.geometry import Geometry, Window, batch_inferred

Tensor = Any

_PAD = 2  # zeros on each side: a sample outside the image reads two by two of them
_FAR = 1e6  # an offset beyond any image, whose fraction is still a number


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

    The reference computes float64, several offset groups, and convolutions that are not depthwise.
    """
    depthwise = geometry.groups == inputs.shape[-1] == kernel.shape[-1]
    if dtype == "float64" or geometry.offset_groups > 1 or not depthwise:
        return reference.deformable_conv2d(inputs, kernel, offsets, mask, bias, geometry, dtype)
    import tensorflow as tf

    frame = reference.Frame(inputs, geometry, "float32")
    batch, height, width = frame.grid[:3]
    rows, weights = _locate(frame, ops.cast(offsets, frame.dtype))
    if mask is not None:
        weights = [weight * ops.cast(mask, frame.dtype) for weight in weights]
    corners, positions = 4 * geometry.taps, height * width
    rows = ops.reshape(ops.concatenate(rows, axis=-1), batch_inferred((batch, positions, corners)))
    weights = ops.reshape(ops.concatenate(weights, axis=-1), batch_inferred((batch, positions, 1, corners)))
    samples = tf.gather(_table(frame, inputs, kernel), rows, batch_dims=1)
    output = ops.reshape(ops.matmul(weights, samples), batch_inferred(frame.columns_shape))
    if bias is not None:
        output = output + ops.cast(bias, frame.dtype)
    return ops.cast(output, dtype)


def _table(frame: reference.Frame, inputs: Tensor, kernel: Tensor) -> Tensor:
    """The padded image times the kernel: `(N, rows, C)`, a row for each pixel and tap."""
    sides, taps = (_PAD, _PAD), frame.geometry.taps
    padded = ops.pad(ops.cast(inputs, frame.dtype), ((0, 0), sides, sides, (0, 0)))
    kernel = ops.reshape(ops.cast(kernel, frame.dtype), (taps, frame.channels))
    rows = (frame.height + 2 * _PAD) * (frame.width + 2 * _PAD) * taps
    return ops.reshape(
        ops.expand_dims(padded, 3) * kernel, batch_inferred((frame.batch, rows, frame.channels))
    )


def _locate(frame: reference.Frame, offsets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Rows in the table, and bilinear weights, of the four corners: each `(N, Ho, Wo, taps)`."""
    geometry, taps = frame.geometry, frame.geometry.taps
    tap = np.arange(taps, dtype="int32")
    is_nan = ops.isnan(offsets)
    offsets = ops.clip(ops.where(is_nan, 0.0, offsets), -_FAR, _FAR)
    whole = ops.floor(offsets)
    (y, fraction_y, nan_y), (x, fraction_x, nan_x) = (
        _take(frame, axis, whole, offsets - whole, ops.cast(is_nan, frame.dtype)) for axis in (0, 1)
    )
    y = _padded(frame, y, geometry.rows, tap // geometry.columns.kernel, axis=1)
    x = _padded(frame, x, geometry.columns, tap % geometry.columns.kernel, axis=2)
    right, below = taps, (ops.cast(frame.width, "int32") + 2 * _PAD) * taps
    first = y * below + x * right + tap
    one, nan = (ops.convert_to_tensor(value, dtype=frame.dtype) for value in (1.0, float("nan")))
    weight = ops.where(nan_y + nan_x > 0, nan, one)
    upper, lower = weight * (1 - fraction_y), weight * fraction_y
    weights = [upper * (1 - fraction_x), upper * fraction_x, lower * (1 - fraction_x), lower * fraction_x]
    return [first, first + right, first + below, first + right + below], weights


def _take(frame: reference.Frame, axis: int, *tensors: Tensor) -> list[Tensor]:
    """The rows (axis 0) or columns (axis 1) in tensors like the offsets: `(N, Ho, Wo, taps)`.

    A product with zeros and ones is faster in LiteRT than a strided slice.
    """
    taps = frame.geometry.taps
    selection = np.eye(2 * taps, dtype="float32")[:, axis::2]
    shape = batch_inferred((*frame.grid[:3], taps))
    return [ops.reshape(ops.matmul(ops.reshape(of, (-1, 2 * taps)), selection), shape) for of in tensors]


def _padded(frame: reference.Frame, offset: Tensor, window: Window, k: np.ndarray, axis: int) -> Tensor:
    """The rows or columns in the padded image before the samples of the taps with index `k` along an axis."""
    first = ops.arange(frame.grid[axis]) * window.stride - frame.margins[axis - 1]
    resting = ops.expand_dims(ops.cast(first, "int32"), 1) + k * window.dilation
    resting = ops.expand_dims(ops.expand_dims(resting, 0), 3 - axis)
    size = frame.height if axis == 1 else frame.width
    # Not between 0 and 6, which the converter replaces by a ReLU6 that LiteRT does not have for integers.
    position = ops.clip(resting + ops.cast(offset, "int32"), -_PAD, ops.cast(size, "int32"))
    return position + _PAD
