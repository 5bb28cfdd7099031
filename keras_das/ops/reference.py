"""Deformable convolution in `keras.ops`: every backend, XLA, any order of gradient, bounded memory.

The taps are taken one after another: one tap is sampled, weighted and added up before the next begins, in
the gradient too, which samples again rather than keep what the forward pass saw. So the memory at the peak
does not grow with the number of taps, and XLA fuses a tap into few passes over the feature map.

Everything here is channels last. A position is held as a whole pixel and a fraction, `base + floor(offset)`
and `offset - floor(offset)`: both are exact in float32, so the weights do not lose digits far from the
origin.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_das.ops.geometry import Geometry

Tensor = Any

# Zero pixels around the image. One on each side makes every corner of a sample inside readable; the second
# row on top makes the 2x2 patch at the origin all zeros, which is where samples off the image read.
_TOP, _BOTTOM, _LEFT, _RIGHT = 2, 1, 1, 1


def deformable_conv2d(
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Samples, weights and adds up, tap by tap.

    Args:
        inputs: `(N, H, W, C)`.
        kernel: `(kh, kw, C / groups, filters)`.
        offsets: `(N, Ho, Wo, offset_groups * kh * kw * 2)`, in input pixels.
        mask: `(N, Ho, Wo, offset_groups * kh * kw)`, or `None` for all ones.
        bias: `(filters,)` or `None`.
        geometry: Windows and groups. All arguments are validated by the caller.

    Returns:
        `(N, Ho, Wo, filters)` in the result type of `inputs` and `kernel`.
    """
    result_dtype = keras.backend.result_type(inputs.dtype, kernel.dtype)
    frame = _Frame(inputs, geometry, "float64" if result_dtype == "float64" else "float32")
    tensors = [
        frame.pad(inputs),
        ops.reshape(kernel, (geometry.taps, *kernel.shape[2:])),
        ops.reshape(offsets, (*frame.grid, geometry.taps, 2)),
    ]
    if mask is not None:
        tensors.append(ops.reshape(mask, (*frame.grid, geometry.taps)))

    @ops.custom_gradient
    def accumulate(*tensors: Tensor) -> tuple[Tensor, Any]:
        # The forward pass must leave nothing on the tape: the gradient computes afresh what it needs.
        output = _forward(_Taps(frame, *map(ops.stop_gradient, tensors)))

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
            grad_output = args[0] if upstream is None else upstream
            gradients = _backward(_Taps(frame, *tensors), grad_output)
            return tuple(ops.cast(g, of.dtype) for g, of in zip(gradients, tensors, strict=True))

        return output, gradient

    output = accumulate(*tensors)
    if bias is not None:
        output = output + ops.cast(bias, frame.dtype)
    return ops.cast(output, result_dtype)


class _Frame:
    """The sizes of one call: the image, the zeros around it, and the grid of output positions."""

    def __init__(self, inputs: Tensor, geometry: Geometry, dtype: str):
        self.geometry, self.dtype = geometry, dtype
        batch, height, width, self.channels = ops.shape(inputs)
        self.batch, self.height, self.width = map(_wide, (batch, height, width))
        out_height = geometry.rows.output_size(self.height)
        out_width = geometry.columns.output_size(self.width)
        self.grid = (self.batch, out_height, out_width, geometry.offset_groups)
        self.depth = self.channels // geometry.offset_groups  # channels that are read together
        self.padded_height = self.height + _TOP + _BOTTOM
        self.padded_width = self.width + _LEFT + _RIGHT
        self.table_rows = self.batch * self.padded_height * self.padded_width * geometry.offset_groups

    def pad(self, inputs: Tensor) -> Tensor:
        """The image among its zeros, as a table `(rows, depth)` with one row for each read."""
        padded = ops.pad(inputs, ((0, 0), (_TOP, _BOTTOM), (_LEFT, _RIGHT), (0, 0)))
        return ops.reshape(padded, (self.table_rows, self.depth))


class _Sample(NamedTuple):
    """Where one tap reads: for each of the four corners its rows in the padded image and its weight."""

    rows: tuple[Tensor, ...]  # 4 x (N, Ho, Wo, offset_groups), rows of the table
    weights: tuple[Tensor, ...]  # 4 x (N, Ho, Wo, offset_groups)
    fraction_y: Tensor
    fraction_x: Tensor


class _Taps:
    """The tensors of one call, and what each tap sees of them."""

    def __init__(
        self, frame: _Frame, table: Tensor, kernel: Tensor, offsets: Tensor, mask: Tensor | None = None
    ):
        self.frame, self.table, self.kernel, self.offsets, self.mask = frame, table, kernel, offsets, mask
        self.geometry = frame.geometry

    def __len__(self) -> int:
        return self.geometry.taps

    def offset(self, tap: int) -> Tensor:
        """`(N, Ho, Wo, offset_groups, 2)`."""
        return ops.cast(self.offsets[..., tap, :], self.frame.dtype)

    def weights(self, tap: int) -> Tensor:
        """The kernel at one tap: `(C / groups, filters)`."""
        return ops.cast(self.kernel[tap], self.frame.dtype)

    def modulation(self, tap: int) -> Tensor | None:
        """The mask at one tap: `(N, Ho, Wo, offset_groups)`."""
        return None if self.mask is None else ops.cast(self.mask[..., tap], self.frame.dtype)

    def locate(self, tap: int, offset: Tensor) -> _Sample:
        """Turns one tap's offsets into the corners to read and their bilinear weights."""
        ky, kx = divmod(tap, self.geometry.columns.kernel)
        y, fraction_y = self._split(self.geometry.rows, ky, self.frame.height, offset[..., 0], axis=1)
        x, fraction_x = self._split(self.geometry.columns, kx, self.frame.width, offset[..., 1], axis=2)
        inside = ops.logical_and(
            _on_image(y, fraction_y, self.frame.height), _on_image(x, fraction_x, self.frame.width)
        )  # False for a NaN
        # Off the image all corners are zeros, and the fraction is 0, or NaN where the offset was.
        is_nan = ops.logical_or(ops.isnan(offset[..., 0]), ops.isnan(offset[..., 1]))
        elsewhere = ops.where(is_nan, ops.full_like(fraction_y, float("nan")), ops.zeros_like(fraction_y))
        fraction_y = ops.where(inside, fraction_y, elsewhere)
        fraction_x = ops.where(inside, fraction_x, elsewhere)
        rows = self._table_rows(
            ops.where(inside, y, ops.full_like(y, -_TOP)), ops.where(inside, x, ops.full_like(x, -_LEFT))
        )
        weights = (
            (1 - fraction_y) * (1 - fraction_x),
            (1 - fraction_y) * fraction_x,
            fraction_y * (1 - fraction_x),
            fraction_y * fraction_x,
        )
        return _Sample(rows, weights, fraction_y, fraction_x)

    def read(self, rows: Tensor) -> Tensor:
        """The pixels at `rows`: `(N, Ho, Wo, offset_groups, depth)`."""
        return ops.cast(ops.take(self.table, rows, axis=0), self.frame.dtype)

    def spread(self, rows: Tensor, values: Tensor) -> Tensor:
        """The transpose of `read`: adds `values` up where they were read from, in the table's shape."""
        batch, height, width, groups = self.frame.grid
        count = batch * height * width * groups
        return ops.segment_sum(
            ops.reshape(values, (count, self.frame.depth)),
            ops.reshape(rows, (count,)),
            num_segments=self.frame.table_rows,
        )

    def _split(self, window: Any, k: int, size: Any, offset: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """A tap's coordinate along one axis, as a whole pixel (still a float) and a fraction in [0, 1]."""
        count = window.output_size(size)
        shape = [1, 1, 1, 1]
        shape[axis] = count
        first = k * window.dilation - window.pad_before(size)
        base = ops.cast(ops.arange(count) * window.stride + first, self.frame.dtype)
        whole = ops.floor(offset)
        return whole + ops.reshape(base, shape), offset - whole

    def _table_rows(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        frame = self.frame
        dtype = _index_dtype(frame.table_rows)
        batch, _, _, groups = frame.grid
        image = ops.reshape(ops.cast(ops.arange(batch), dtype), (batch, 1, 1, 1))
        group = ops.reshape(ops.cast(ops.arange(groups), dtype), (1, 1, 1, groups))
        row = image * frame.padded_height + ops.cast(y, dtype) + _TOP
        first = (row * frame.padded_width + ops.cast(x, dtype) + _LEFT) * groups + group
        below = first + frame.padded_width * groups
        return first, first + groups, below, below + groups


def _forward(taps: _Taps) -> Tensor:
    output = None
    for tap in range(len(taps)):
        sample = taps.locate(tap, _after(taps.offset(tap), output))
        modulation = taps.modulation(tap)
        columns = _interpolate(taps, sample, modulation)
        term = _apply_kernel(columns, taps.weights(tap), taps.geometry.groups)
        output = term if output is None else output + term
    return output


def _interpolate(taps: _Taps, sample: _Sample, modulation: Tensor | None) -> Tensor:
    """The sampled and modulated feature map of one tap: `(N, Ho, Wo, C)`."""
    columns = 0.0
    for rows, weight in zip(sample.rows, sample.weights, strict=True):
        if modulation is not None:
            weight = weight * modulation
        columns = columns + taps.read(rows) * weight[..., None]
    return ops.reshape(columns, (*taps.frame.grid[:3], taps.frame.channels))


def _backward(taps: _Taps, grad_output: Tensor) -> list[Tensor]:
    grad_table = ops.zeros((taps.frame.table_rows, taps.frame.depth), dtype=taps.frame.dtype)
    grad_kernel, grad_offsets, grad_mask = [], [], []
    for tap in range(len(taps)):
        offset, upstream = _after(taps.offset(tap), grad_table), _after(grad_output, grad_table)
        grad_table, by_kernel, by_offset, by_mask = _backward_tap(taps, tap, offset, upstream, grad_table)
        grad_kernel.append(by_kernel)
        grad_offsets.append(by_offset)
        grad_mask.append(by_mask)
    gradients = [grad_table, ops.stack(grad_kernel), ops.stack(grad_offsets, axis=-2)]
    if taps.mask is not None:
        gradients.append(ops.stack(grad_mask, axis=-1))
    return gradients


def _backward_tap(
    taps: _Taps, tap: int, offset: Tensor, grad_output: Tensor, grad_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One tap's share: the table's gradient so far with it added, and those of kernel, offset and mask."""
    sample, modulation = taps.locate(tap, offset), taps.modulation(tap)
    groups = taps.geometry.groups
    # What the loss would gain from each sampled value, ahead of the mask.
    grad_columns = ops.reshape(
        _apply_kernel_transposed(grad_output, taps.weights(tap), groups), (*taps.frame.grid, taps.frame.depth)
    )
    columns, products = 0.0, []
    for rows, weight in zip(sample.rows, sample.weights, strict=True):
        pixels = taps.read(rows)
        products.append(ops.sum(pixels * grad_columns, axis=-1))
        masked = weight if modulation is None else weight * modulation
        columns = columns + pixels * masked[..., None]
        grad_table = grad_table + taps.spread(rows, grad_columns * masked[..., None])
    columns = ops.reshape(columns, (*taps.frame.grid[:3], taps.frame.channels))
    by_kernel = _kernel_gradient(columns, grad_output, groups)
    by_mask = sum(weight * product for weight, product in zip(sample.weights, products, strict=True))
    p00, p01, p10, p11 = products
    fy, fx = sample.fraction_y, sample.fraction_x
    by_offset = ops.stack(
        [(1 - fx) * (p10 - p00) + fx * (p11 - p01), (1 - fy) * (p01 - p00) + fy * (p11 - p10)], axis=-1
    )
    if modulation is not None:
        by_offset = by_offset * modulation[..., None]
    return grad_table, by_kernel, by_offset, by_mask


def _apply_kernel(columns: Tensor, weights: Tensor, groups: int) -> Tensor:
    """`(N, Ho, Wo, C)` by `(C / groups, filters)`: `(N, Ho, Wo, filters)`."""
    depth, filters = weights.shape
    if groups == 1:
        return ops.matmul(columns, weights)
    if depth == 1:
        if filters == groups:
            return columns * weights
        product = columns[..., None] * ops.reshape(weights, (groups, filters // groups))
    else:
        by_group = ops.reshape(weights, (depth, groups, filters // groups))
        product = ops.einsum("nhwgc,cgf->nhwgf", _group(columns, groups), by_group)
    return ops.reshape(product, (*ops.shape(columns)[:3], filters))


def _apply_kernel_transposed(grad_output: Tensor, weights: Tensor, groups: int) -> Tensor:
    """`(N, Ho, Wo, filters)` back to `(N, Ho, Wo, C)`."""
    depth, filters = weights.shape
    if groups == 1:
        return ops.matmul(grad_output, ops.transpose(weights))
    if depth == 1:
        if filters == groups:
            return grad_output * weights
        return ops.sum(
            _group(grad_output, groups) * ops.reshape(weights, (groups, filters // groups)), axis=-1
        )
    by_group = ops.reshape(weights, (depth, groups, filters // groups))
    product = ops.einsum("nhwgf,cgf->nhwgc", _group(grad_output, groups), by_group)
    return ops.reshape(product, (*ops.shape(grad_output)[:3], groups * depth))


def _kernel_gradient(columns: Tensor, grad_output: Tensor, groups: int) -> Tensor:
    """The gradient of `_apply_kernel` for its weights: `(C / groups, filters)`."""
    depth, filters = columns.shape[-1] // groups, grad_output.shape[-1]
    if groups == 1:
        return ops.tensordot(columns, grad_output, axes=[[0, 1, 2], [0, 1, 2]])
    if depth == 1 and filters == groups:
        by_channel = ops.sum(columns * grad_output, axis=(0, 1, 2))
    elif depth == 1:
        by_channel = ops.sum(columns[..., None] * _group(grad_output, groups), axis=(0, 1, 2))
    else:
        by_channel = ops.einsum("nhwgc,nhwgf->cgf", _group(columns, groups), _group(grad_output, groups))
    return ops.reshape(by_channel, (depth, filters))


def _group(x: Tensor, groups: int) -> Tensor:
    return ops.reshape(x, (*ops.shape(x)[:3], groups, x.shape[-1] // groups))


def _on_image(whole: Tensor, fraction: Tensor, size: Any) -> Tensor:
    """Whether -1 < whole + fraction < size."""
    size = ops.cast(size, whole.dtype)
    above = ops.logical_or(whole >= 0, ops.logical_and(whole == -1, fraction > 0))
    return ops.logical_and(above, whole < size)


def _wide(size: Any) -> Any:
    """A size that can be multiplied safely: an int, or 64-bit where the graph leaves it open."""
    return size if isinstance(size, int) else ops.cast(size, "int64")


def _index_dtype(rows: Any) -> str:
    """32-bit row numbers where they are known to suffice, else 64-bit."""
    if isinstance(rows, int) and rows < 2**31:
        return "int32"
    if keras.backend.backend() == "jax":
        raise ValueError(
            "On JAX `inputs` must have fewer than 2**31 pixels times offset groups, its padding included. "
            f"Received: {rows}"
        )
    return "int64"


def _after(x: Tensor, done: Tensor | None) -> Tensor:
    """`x`, but not before `done` is there.

    A TensorFlow graph runs whatever is ready, all taps at once, and would hold all their samples at once.
    """
    if done is None or keras.backend.backend() != "tensorflow":
        return x
    import tensorflow as tf

    with tf.control_dependencies([done]):
        return tf.identity(x)
