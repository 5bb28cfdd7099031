"""Deformable convolution in `keras.ops`: all backends, XLA, gradients of any order, bounded memory.

A loop processes one tap at a time: the tap is sampled, weighted and added to the sum. The gradient samples
again instead of storing the samples of the forward pass. Peak memory is therefore independent of the number
of taps, XLA needs few passes over the feature map per tap, and graphs stay small.

Everything in this module is channels last. Positions are stored as an integer and a fraction,
`base + floor(offset)` and `offset - floor(offset)`. Both are exact in float32, so weights keep their
precision far from the origin.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_das.ops.geometry import Geometry

Tensor = Any

# Zero pixels around the image. One on each side makes all corners of the samples inside the image readable.
# The second row at the top makes the 2x2 patch at the origin zero; samples outside the image read this patch.
_TOP, _BOTTOM, _LEFT, _RIGHT = 2, 1, 1, 1


def deformable_conv2d(
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    dtype: str,
) -> Tensor:
    """Samples, weights and sums tap by tap.

    Args:
        inputs: Tensor `(N, H, W, C)`.
        kernel: Tensor `(kh, kw, C / groups, filters)`.
        offsets: Tensor `(N, Ho, Wo, offset_groups * kh * kw * 2)`, in input pixels.
        mask: Tensor `(N, Ho, Wo, offset_groups * kh * kw)`, or `None` for a mask of ones.
        bias: Tensor `(filters,)` or `None`.
        geometry: `Geometry` with the windows and groups. The caller validates all arguments.
        dtype: String. Dtype of the result.

    Returns:
        `(N, Ho, Wo, filters)`.
    """
    frame = Frame(inputs, geometry, "float64" if dtype == "float64" else "float32")
    taps = geometry.taps
    # Reshaping turns variables into tensors, as custom gradients require. Taps come first, for the loop.
    tensors = [
        ops.reshape(inputs, (frame.batch, frame.height, frame.width, frame.channels)),
        ops.reshape(kernel, (taps, *kernel.shape[2:])),
        ops.transpose(ops.reshape(offsets, (*frame.grid, taps, 2)), (4, 0, 1, 2, 3, 5)),
    ]
    if mask is not None:
        tensors.append(ops.transpose(ops.reshape(mask, (*frame.grid, taps)), (4, 0, 1, 2, 3)))

    @ops.custom_gradient
    def accumulate(*tensors: Tensor) -> tuple[Tensor, Any]:
        # The forward pass records nothing on the tape, because the gradient recomputes what it needs.
        output = _forward(frame, *_with_mask([ops.stop_gradient(t) for t in tensors]))

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
            # JAX rejects reshaped empty batches, and torch's `segment_sum` fails on them.
            if isinstance(frame.batch, int) and frame.batch == 0:
                return tuple(ops.zeros(tuple(of.shape), dtype=of.dtype) for of in tensors)
            grad_output = args[0] if upstream is None else upstream
            gradients = _backward(frame, grad_output, *_with_mask(tensors))
            return tuple(ops.cast(g, of.dtype) for g, of in zip(gradients, tensors, strict=True))

        return output, gradient

    output = accumulate(*tensors)
    if bias is not None:
        output = output + ops.cast(bias, frame.dtype)
    return ops.cast(output, dtype)


def _with_mask(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs, kernel, offsets and mask; the mask is `None` if there is none."""
    return (*tensors, None) if len(tensors) == 3 else tuple(tensors)


class Frame:
    """The sizes of one call: the image, its zero padding, and the grid of output positions."""

    def __init__(self, inputs: Tensor, geometry: Geometry, dtype: str):
        """The sizes for `inputs` `(N, H, W, C)`; `dtype` is that of the computation."""
        self.geometry, self.dtype = geometry, dtype
        batch, height, width, self.channels = ops.shape(inputs)
        self.batch, self.height, self.width = map(_wide, (batch, height, width))
        # Divide before widening, because LiteRT cannot divide 64-bit integers.
        out_height, out_width = (
            _wide(geometry.rows.output_size(height)),
            _wide(geometry.columns.output_size(width)),
        )
        self.margins = _wide(geometry.rows.pad_before(height)), _wide(geometry.columns.pad_before(width))
        self.grid = (self.batch, out_height, out_width, geometry.offset_groups)
        self.columns_shape = (self.batch, out_height, out_width, self.channels)
        self.depth = self.channels // geometry.offset_groups  # channels that share a read
        self.padded_height = self.height + _TOP + _BOTTOM
        self.padded_width = self.width + _LEFT + _RIGHT
        self.table_rows = self.batch * self.padded_height * self.padded_width * geometry.offset_groups

    def pad(self, inputs: Tensor) -> Tensor:
        """The zero-padded image as a table `(rows, depth)`; a read fetches one row."""
        padded = ops.pad(inputs, ((0, 0), (_TOP, _BOTTOM), (_LEFT, _RIGHT), (0, 0)))
        return ops.reshape(padded, (self.table_rows, self.depth))

    def crop(self, table: Tensor) -> Tensor:
        """The transpose of `pad`."""
        padded = ops.reshape(table, (self.batch, self.padded_height, self.padded_width, self.channels))
        return padded[:, _TOP : _TOP + self.height, _LEFT : _LEFT + self.width, :]


class _Sample(NamedTuple):
    """The positions that one tap samples. Tensors have shape `(N, Ho, Wo, offset_groups)`, tuples one per
    corner.
    """

    rows: tuple[Tensor, ...]  # in the table of pixels
    weights: tuple[Tensor, ...]
    fraction_y: Tensor
    fraction_x: Tensor


def _locate(frame: Frame, offsets: Tensor, tap: Tensor) -> _Sample:
    """Converts the offsets of one tap to the corners to read and their bilinear weights."""
    geometry = frame.geometry
    offset_y, offset_x = (ops.cast(ops.take(offsets, axis, axis=-1), frame.dtype) for axis in (0, 1))
    ky, kx = tap // geometry.columns.kernel, tap % geometry.columns.kernel
    floor_y, floor_x = ops.floor(offset_y), ops.floor(offset_x)
    y, fraction_y = _resting_position(frame, ky, axis=1) + floor_y, offset_y - floor_y
    x, fraction_x = _resting_position(frame, kx, axis=2) + floor_x, offset_x - floor_x
    # False for NaN.
    inside = ops.logical_and(_on_image(y, fraction_y, frame.height), _on_image(x, fraction_x, frame.width))
    # Outside the image, all corners are zero and the fraction is 0, or NaN if the offset is NaN.
    is_nan = ops.logical_or(ops.isnan(offset_y), ops.isnan(offset_x))
    # The NaN is a constant, because tf2onnx otherwise converts the selection to products.
    nan = ops.convert_to_tensor(float("nan"), dtype=frame.dtype)
    elsewhere = ops.where(is_nan, nan, ops.zeros_like(fraction_y))
    fraction_y, fraction_x = (ops.where(inside, f, elsewhere) for f in (fraction_y, fraction_x))

    dtype = _index_dtype(frame.table_rows)
    y = ops.cast(ops.where(inside, y, ops.full_like(y, -_TOP)), dtype)
    x = ops.cast(ops.where(inside, x, ops.full_like(x, -_LEFT)), dtype)
    image = ops.reshape(ops.cast(ops.arange(frame.batch), dtype), (frame.batch, 1, 1, 1))
    groups = geometry.offset_groups
    group = ops.reshape(ops.cast(ops.arange(groups), dtype), (1, 1, 1, groups))
    row = image * frame.padded_height + y + _TOP
    first = (row * frame.padded_width + x + _LEFT) * groups + group
    below = first + frame.padded_width * groups
    weights = (
        (1 - fraction_y) * (1 - fraction_x),
        (1 - fraction_y) * fraction_x,
        fraction_y * (1 - fraction_x),
        fraction_y * fraction_x,
    )
    return _Sample((first, first + groups, below, below + groups), weights, fraction_y, fraction_x)


def _resting_position(frame: Frame, k: Tensor, axis: int) -> Tensor:
    """The integer positions of tap row or column `k` at offset zero, along one axis of the grid."""
    window = frame.geometry.rows if axis == 1 else frame.geometry.columns
    shape = [1, 1, 1, 1]
    shape[axis] = frame.grid[axis]
    first = ops.arange(frame.grid[axis]) * window.stride - frame.margins[axis - 1]
    positions = ops.cast(first, frame.dtype) + ops.cast(k * window.dilation, frame.dtype)
    return ops.reshape(positions, shape)


def _forward(frame: Frame, inputs: Tensor, kernel: Tensor, offsets: Tensor, mask: Tensor | None) -> Tensor:
    table = frame.pad(inputs)

    def add_tap(tap: Tensor, output: Tensor) -> tuple[Tensor]:
        sample = _locate(frame, ops.take(offsets, tap, axis=0), tap)
        masked = _masked(sample.weights, at_tap(frame, mask, tap))
        columns = 0.0
        for rows, weight in zip(sample.rows, masked, strict=True):
            columns = columns + _read(frame, table, rows) * _add_last_axis(weight)
        columns = ops.reshape(columns, frame.columns_shape)
        return (output + apply_kernel(columns, at_tap(frame, kernel, tap), frame.geometry.groups),)

    (output,) = over_taps(frame, add_tap, ops.zeros((*frame.grid[:3], kernel.shape[-1]), dtype=frame.dtype))
    return output


def _backward(
    frame: Frame, grad_output: Tensor, inputs: Tensor, kernel: Tensor, offsets: Tensor, mask: Tensor | None
) -> tuple[Tensor, ...]:
    table, groups = frame.pad(inputs), frame.geometry.groups

    def add_tap(tap: Tensor, grad_table: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        sample = _locate(frame, ops.take(offsets, tap, axis=0), tap)
        modulation, weights = at_tap(frame, mask, tap), at_tap(frame, kernel, tap)
        # The gradient of the samples before they are multiplied by the mask.
        grad_columns = _apply_kernel_transposed(grad_output, weights, groups)
        grad_columns = ops.reshape(grad_columns, (*frame.grid, frame.depth))
        columns, products = 0.0, []
        for rows, weight in zip(sample.rows, _masked(sample.weights, modulation), strict=True):
            pixels = _read(frame, table, rows)
            products.append(ops.sum(pixels * grad_columns, axis=-1))
            columns = columns + pixels * _add_last_axis(weight)
            grad_table = grad_table + _spread(frame, rows, grad_columns * _add_last_axis(weight))
        grad_kernel = _kernel_gradient(ops.reshape(columns, frame.columns_shape), grad_output, groups)
        by_tap = [grad_kernel, _offset_gradient(sample, products, modulation)]
        if modulation is not None:
            by_tap.append(sum(w * product for w, product in zip(sample.weights, products, strict=True)))
        written = (_write(frame, x, tap, new) for x, new in zip(grads, by_tap, strict=True))
        return (grad_table, *written)

    parts = [kernel, offsets] if mask is None else [kernel, offsets, mask]
    grad_table, *grads = over_taps(
        frame,
        add_tap,
        ops.zeros((frame.table_rows, frame.depth), dtype=frame.dtype),
        *(ops.zeros(ops.shape(part), dtype=frame.dtype) for part in parts),
    )
    return (frame.crop(grad_table), *grads)


def over_taps(frame: Frame, body: Callable[..., tuple[Tensor, ...]], *state: Tensor) -> tuple[Tensor, ...]:
    """Runs `state = body(tap, *state)` for each tap in order."""
    taps = frame.geometry.taps
    if keras.backend.backend() != "tensorflow":
        return ops.fori_loop(0, taps, lambda tap, state: body(tap, *state), state)
    import tensorflow as tf

    def step(tap: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        # In graphs with unknown sizes, shape inference can know less after the body than before it.
        return tap + 1, *(
            tf.ensure_shape(new, old.shape) for new, old in zip(body(tap, *state), state, strict=True)
        )

    # `ops.fori_loop` runs up to ten taps in parallel in graphs, and XLA cannot differentiate it.
    loop = tf.while_loop(
        lambda tap, *_: tap < taps,
        step,
        (tf.constant(0), *state),
        parallel_iterations=1,
        maximum_iterations=taps,
    )
    return tuple(loop[1:])


def at_tap(frame: Frame, x: Tensor | None, tap: Tensor) -> Tensor | None:
    """One tap of a mask `(taps, N, Ho, Wo, offset_groups)` or a kernel `(taps, C / groups, filters)`."""
    return None if x is None else ops.cast(ops.take(x, tap, axis=0), frame.dtype)


def _write(frame: Frame, x: Tensor, tap: Tensor, value: Tensor) -> Tensor:
    """`x` with the part of one tap replaced, without TensorFlow's scatter, which rejects empty batches."""
    taps = frame.geometry.taps
    here = ops.reshape(ops.equal(ops.arange(taps), tap), (taps, *[1] * len(value.shape)))
    return ops.where(here, value[None], x)


def _masked(weights: tuple[Tensor, ...], modulation: Tensor | None) -> tuple[Tensor, ...]:
    return weights if modulation is None else tuple(weight * modulation for weight in weights)


def _offset_gradient(sample: _Sample, products: list[Tensor], modulation: Tensor | None) -> Tensor:
    """The gradient of the offsets, from the gradients of the corners' weights."""
    p00, p01, p10, p11 = products
    fy, fx = sample.fraction_y, sample.fraction_x
    gradient = ops.stack(
        [(1 - fx) * (p10 - p00) + fx * (p11 - p01), (1 - fy) * (p01 - p00) + fy * (p11 - p10)], axis=-1
    )
    return gradient if modulation is None else gradient * _add_last_axis(modulation)


def _read(frame: Frame, table: Tensor, rows: Tensor) -> Tensor:
    """The pixels at `rows`: `(N, Ho, Wo, offset_groups, depth)`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        pixels = tf.gather(table, rows)  # `ops.take` handles negative indices, at three more operations
    else:
        pixels = ops.take(table, rows, axis=0)
    return ops.cast(pixels, frame.dtype)


def _spread(frame: Frame, rows: Tensor, values: Tensor) -> Tensor:
    """The transpose of `_read`: adds `values` at the rows they were read from, in a table of zeros."""
    batch, height, width, groups = frame.grid
    count = batch * height * width * groups
    return ops.segment_sum(
        ops.reshape(values, (count, frame.depth)),
        ops.reshape(rows, (count,)),
        num_segments=frame.table_rows,
    )


def apply_kernel(columns: Tensor, weights: Tensor, groups: int) -> Tensor:
    """Multiplies `(N, Ho, Wo, C)` by `(C / groups, filters)`; the result is `(N, Ho, Wo, filters)`."""
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
    """The transpose of `apply_kernel`: maps `(N, Ho, Wo, filters)` to `(N, Ho, Wo, C)`."""
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
    """The gradient of `apply_kernel` with respect to its weights: `(C / groups, filters)`."""
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


def _add_last_axis(x: Tensor) -> Tensor:
    """`x[..., None]`, by an operation that LiteRT also supports for unknown sizes."""
    return ops.expand_dims(x, -1)


def _wide(size: Any) -> Any:
    """A size that is safe to multiply: an int, or a 64-bit tensor if the graph does not know the size.

    A size that JAX does not know is a symbol, which is unlimited.
    """
    return size if isinstance(size, int) or keras.backend.backend() == "jax" else ops.cast(size, "int64")


def _index_dtype(rows: Any) -> str:
    """32-bit row indices if they are known to suffice, otherwise 64-bit."""
    if isinstance(rows, int) and rows < 2**31:
        return "int32"
    if keras.backend.backend() == "jax":
        if not isinstance(rows, int):
            return "int32"  # a symbol, as in exports
        raise ValueError(
            "On JAX, the padded rows x columns x offset groups of `inputs` must be below 2**31. "
            f"Received: {rows}"
        )
    return "int64"
