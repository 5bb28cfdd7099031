"""A reference implementation of the op and the gate in plain NumPy, which the tests compare with.

It follows the specification, loops over single samples in float64, and imports nothing from the package. All
tensors are channels last. Tests of other layouts must transpose them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator

import numpy as np


def pair(value):
    """Expands one number to both axes."""
    return (value, value) if isinstance(value, int) else tuple(value)


def padding_amounts(padding, size, kernel_size, strides, dilation):
    """Returns ((top, bottom), (left, right)) in pixels. Like TensorFlow, "same" pads more at the end."""
    if not isinstance(padding, str):
        return tuple(tuple(sides) for sides in padding)
    if padding.lower() == "valid":
        return ((0, 0), (0, 0))
    amounts = []
    for length, taps, stride, rate in zip(size, kernel_size, strides, dilation, strict=True):
        outputs = math.ceil(length / stride)
        total = max((outputs - 1) * stride + (taps - 1) * rate + 1 - length, 0)
        amounts.append((total // 2, total - total // 2))
    return tuple(amounts)


class Geometry:
    """The positions of the taps without offsets for each output pixel, and the channels that they sample."""

    def __init__(self, inputs_shape, kernel_shape, strides, padding, dilation_rate, offset_groups):
        self.batch, self.height, self.width, self.channels = inputs_shape
        *self.kernel_size, self.group_channels, self.filters = kernel_shape
        self.strides, self.dilation = pair(strides), pair(dilation_rate)
        size = (self.height, self.width)
        self.padding = padding_amounts(padding, size, self.kernel_size, self.strides, self.dilation)
        self.output_size = tuple(
            (length + sum(sides) - (taps - 1) * rate - 1) // stride + 1
            for length, sides, taps, rate, stride in zip(
                size, self.padding, self.kernel_size, self.dilation, self.strides, strict=True
            )
        )
        self.taps = self.kernel_size[0] * self.kernel_size[1]
        self.offset_groups = offset_groups
        self.groups = self.channels // self.group_channels

    @property
    def output_shape(self):
        return (self.batch, *self.output_size, self.filters)

    def samples(self):
        """Iterates over all samples (image, row, column, offset group, tap)."""
        return itertools.product(*map(range, (self.batch, *self.output_size, self.offset_groups, self.taps)))

    def resting_position(self, row, column, tap):
        """The position of a tap without its offset, in input pixels."""
        ky, kx = divmod(tap, self.kernel_size[1])
        return (
            row * self.strides[0] + ky * self.dilation[0] - self.padding[0][0],
            column * self.strides[1] + kx * self.dilation[1] - self.padding[1][0],
        )

    def offset_block(self, group):
        """The channels of an offset group."""
        width = self.channels // self.offset_groups
        return slice(group * width, (group + 1) * width)

    def convolution_blocks(self):
        """Yields the channels and the filters of each group of the convolution."""
        channels, filters = self.group_channels, self.filters // self.groups
        for group in range(self.groups):
            yield (
                slice(group * channels, (group + 1) * channels),
                slice(group * filters, (group + 1) * filters),
            )


def corners(y, x, height, width):
    """Yields (row, column, weight, d weight / dy, d weight / dx) of the corners that are in the image.

    At integer positions, the derivatives are those of the cell floor(y) <= y < floor(y) + 1, that is,
    one-sided derivatives from the right.
    """
    if not (-1 < y < height and -1 < x < width):
        return
    one = type(y)(1)
    top, left = np.floor(y), np.floor(x)
    fy, fx = y - top, x - left
    for row, wy, slope_y in ((int(top), one - fy, -one), (int(top) + 1, fy, one)):
        for column, wx, slope_x in ((int(left), one - fx, -one), (int(left) + 1, fx, one)):
            if 0 <= row < height and 0 <= column < width:
                yield row, column, wy * wx, slope_y * wx, wy * slope_x


def _sample(image, y, x):
    """The value, d/dy, and d/dx of an image (H, W, channels) at one position."""
    height, width, channels = image.shape
    value, along_y, along_x = np.zeros((3, channels), image.dtype)
    if np.isnan(y) or np.isnan(x):
        return value + y + x, along_y + y + x, along_x + y + x
    for row, column, weight, weight_dy, weight_dx in corners(y, x, height, width):
        value = value + weight * image[row, column]
        along_y = along_y + weight_dy * image[row, column]
        along_x = along_x + weight_dx * image[row, column]
    return value, along_y, along_x


def _split(offsets, mask, geometry, dtype):
    """Reshapes offsets to (N, Ho, Wo, groups, taps, 2) and mask to (N, Ho, Wo, groups, taps)."""
    shape = (geometry.batch, *geometry.output_size, geometry.offset_groups, geometry.taps)
    offsets = np.asarray(offsets).astype(dtype).reshape(*shape, 2)
    mask = np.ones(shape, dtype) if mask is None else np.asarray(mask).astype(dtype).reshape(shape)
    return offsets, mask


def _position(geometry, offsets, index):
    """The position of one sample in the dtype of the offsets."""
    _, row, column, _, tap = index
    scalar = offsets.dtype.type
    y, x = geometry.resting_position(row, column, tap)
    return scalar(y) + offsets[index][0], scalar(x) + offsets[index][1]


def deformable_conv2d(
    inputs,
    kernel,
    offsets,
    mask=None,
    bias=None,
    strides=1,
    padding="valid",
    dilation_rate=1,
    offset_groups=1,
    dtype=np.float64,
):
    """The forward pass with all intermediates in `dtype`. Shapes are those of the op, channels last."""
    geometry = Geometry(inputs.shape, kernel.shape, strides, padding, dilation_rate, offset_groups)
    inputs, kernel = np.asarray(inputs).astype(dtype), np.asarray(kernel).astype(dtype)
    offsets, mask = _split(offsets, mask, geometry, dtype)
    columns = np.zeros((geometry.batch, *geometry.output_size, geometry.taps, geometry.channels), dtype)
    for index in geometry.samples():
        image, row, column, group, tap = index
        block = geometry.offset_block(group)
        value, _, _ = _sample(inputs[image, :, :, block], *_position(geometry, offsets, index))
        columns[image, row, column, tap, block] = mask[index] * value

    outputs = np.zeros(geometry.output_shape, dtype)
    kernel = kernel.reshape(geometry.taps, geometry.group_channels, geometry.filters)
    for channels, filters in geometry.convolution_blocks():
        # Adds the terms one by one, so that low-precision dtypes round after each of them.
        terms = (
            columns[..., tap, channels][..., channel, None] * kernel[tap, channel, filters]
            for tap in range(geometry.taps)
            for channel in range(geometry.group_channels)
        )
        outputs[..., filters] = functools.reduce(operator.add, terms)
    return outputs if bias is None else outputs + np.asarray(bias).astype(dtype)


def naive_lowprec(*arguments, dtype, **options):
    """A naive low-precision forward pass: each intermediate is rounded to float16 or bfloat16.

    The error of an actual implementation may be at most twice as large.
    """
    return deformable_conv2d(*arguments, dtype=dtype, **options)


def deformable_conv2d_gradients(
    upstream,
    inputs,
    kernel,
    offsets,
    mask=None,
    strides=1,
    padding="valid",
    dilation_rate=1,
    offset_groups=1,
):
    """Gradients of sum(upstream * outputs): a dict with inputs, kernel, offsets, mask, and bias.

    Samples out of bounds do not contribute. The gradient of the mask is present even if `mask` is None.
    """
    geometry = Geometry(inputs.shape, kernel.shape, strides, padding, dilation_rate, offset_groups)
    inputs, kernel, upstream = (np.asarray(a).astype(np.float64) for a in (inputs, kernel, upstream))
    split_offsets, split_mask = _split(offsets, mask, geometry, np.float64)

    flat_kernel = kernel.reshape(geometry.taps, geometry.group_channels, geometry.filters)
    columns = np.zeros((geometry.batch, *geometry.output_size, geometry.taps, geometry.channels))
    d_columns = np.zeros_like(columns)
    for channels, filters in geometry.convolution_blocks():
        d_columns[..., channels] = np.einsum(
            "nijf,tcf->nijtc", upstream[..., filters], flat_kernel[..., filters]
        )

    d_inputs, d_offsets, d_mask = map(np.zeros_like, (inputs, split_offsets, split_mask))
    for index in geometry.samples():
        image, row, column, group, tap = index
        block = geometry.offset_block(group)
        y, x = _position(geometry, split_offsets, index)
        value, along_y, along_x = _sample(inputs[image, :, :, block], y, x)
        columns[image, row, column, tap, block] = split_mask[index] * value
        d_masked = d_columns[image, row, column, tap, block]
        d_value = d_masked * split_mask[index]
        d_mask[index] = d_masked @ value
        d_offsets[index] = d_value @ along_y, d_value @ along_x
        for at_row, at_column, weight, _, _ in corners(y, x, geometry.height, geometry.width):
            d_inputs[image, at_row, at_column, block] += weight * d_value

    d_kernel = np.zeros_like(flat_kernel)
    for channels, filters in geometry.convolution_blocks():
        d_kernel[..., filters] = np.einsum("nijtc,nijf->tcf", columns[..., channels], upstream[..., filters])
    return {
        "inputs": d_inputs,
        "kernel": d_kernel.reshape(kernel.shape),
        "offsets": d_offsets.reshape(np.shape(offsets)),
        "mask": d_mask.reshape(*d_mask.shape[:3], geometry.offset_groups * geometry.taps),
        "bias": upstream.sum((0, 1, 2)),
    }


def conv2d(inputs, kernel, bias=None, padding="same", dilation_rate=1):
    """An ordinary convolution: the op with zero offsets. A kernel (kh, kw, 1, channels) is depthwise."""
    geometry = Geometry(inputs.shape, kernel.shape, 1, padding, dilation_rate, 1)
    offsets = np.zeros((geometry.batch, *geometry.output_size, geometry.taps * 2))
    return deformable_conv2d(inputs, kernel, offsets, bias=bias, padding=padding, dilation_rate=dilation_rate)


def gelu(x):
    """x times the cumulative distribution function of the normal distribution, without tanh approximation."""
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def sigmoid(x):
    return np.where(x >= 0, 1, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))


def normalize(x, axes, scale, center, epsilon):
    """Normalizes to zero mean and unit (biased) variance over `axes`, then scales and shifts channels."""
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + center


def das_gate(
    inputs,
    weights,
    dilation_rate=1,
    offset_groups=1,
    norm_axes=(1, 2, 3),
    gain=1.0,
    gate_scale=1.0,
    offset_scale=1.0,
    instance_epsilon=1e-5,
    layer_epsilon=1e-5,
):
    """The paper's gate (arXiv 2311.12091, equations 1 to 4) on (N, H, W, C); returns (outputs, gate).

    `weights` maps names to arrays. Those marked with * are optional:

    - reduce_depthwise (kh, kw, 1, C), reduce_pointwise (1, 1, C, C'), reduce_bias* (C',): the separable
      reduction
    - instance_scale*, instance_center* (C',)
    - offsets_kernel (kh, kw, C', groups * taps * 2), offsets_bias*: predict the offsets, with the dilation of
      the deformable convolution
    - mask_kernel* (kh, kw, C', groups * taps), mask_bias*: predict the mask before its sigmoid
    - deform_kernel, separable (kh, kw, 1, C') or dense (kh, kw, C', C), and deform_bias*
    - pointwise* (1, 1, C', C), pointwise_bias*: absent in the dense form
    - layer_scale*, layer_center* (C,)

    The layer norm averages over norm_axes. The gate is gate_scale * sigmoid(gain * ...).
    """
    get = weights.get
    reduced = conv2d(inputs, weights["reduce_depthwise"])
    reduced = conv2d(reduced, weights["reduce_pointwise"], get("reduce_bias"))
    centered = normalize(
        reduced, (1, 2), get("instance_scale", 1.0), get("instance_center", 0.0), instance_epsilon
    )
    context = gelu(centered)

    offsets = conv2d(context, weights["offsets_kernel"], get("offsets_bias"), dilation_rate=dilation_rate)
    offsets = offset_scale * offsets
    mask = None
    if "mask_kernel" in weights:
        logits = conv2d(context, weights["mask_kernel"], get("mask_bias"), dilation_rate=dilation_rate)
        mask = sigmoid(logits)
    attention = deformable_conv2d(
        context,
        weights["deform_kernel"],
        offsets,
        mask,
        get("deform_bias"),
        padding="same",
        dilation_rate=dilation_rate,
        offset_groups=offset_groups,
    )
    if "pointwise" in weights:
        attention = conv2d(attention, weights["pointwise"], get("pointwise_bias"))
    layer_scale, layer_center = get("layer_scale", 1.0), get("layer_center", 0.0)
    attention = normalize(attention, norm_axes, layer_scale, layer_center, layer_epsilon)
    gate = gate_scale * sigmoid(gain * attention)
    return inputs * gate, gate
