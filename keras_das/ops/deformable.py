"""`deformable_conv2d`: validates the arguments, chooses an implementation and calls it."""

import contextlib
import contextvars
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import KerasTensor, ops

from keras_das.ops import native, reference
from keras_das.ops.geometry import (
    Geometry,
    Padding,
    as_integer,
    make_windows,
    standardize_data_format,
    standardize_padding,
    standardize_pair,
)

IMPLEMENTATIONS = ("auto", "native", "reference")

Tensor = Any
Shape = tuple[int | None, ...]

_substitute: contextvars.ContextVar[Callable[..., Tensor] | None] = contextvars.ContextVar(
    "keras_das_substitute", default=None
)


@contextlib.contextmanager
def substituted(compute: Callable[..., Tensor]) -> Iterator[None]:
    """Context in which every deformable convolution of this thread is computed by `compute`, for exports.

    Args:
        compute: Function with the arguments and the result of `keras_das.ops.reference.deformable_conv2d`.
    """
    token = _substitute.set(compute)
    try:
        yield
    finally:
        _substitute.reset(token)


def deformable_conv2d(
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    dilation_rate: int | Sequence[int] = 1,
    offset_groups: int = 1,
    data_format: str | None = None,
    implementation: str = "auto",
) -> Tensor:
    """2-D convolution whose taps sample the feature map at given offsets, by bilinear interpolation.

    Tap `(ky, kx)` of output `(i, j)` reads `inputs` at

        y = i * stride + ky * dilation - pad_top + dy
        x = j * stride + kx * dilation - pad_left + dx

    Samples with `y <= -1`, `y >= H`, `x <= -1` or `x >= W` are 0 and pass no gradient. For all others,
    corners outside the image count as 0. A NaN in an offset makes that output position NaN. At integer
    positions, the gradient is that of the cell to the lower right. With zero offsets and no mask, the result
    is that of `keras.ops.conv`.

    With `data_format="channels_first"`, all 4-D tensors except the kernel, including offsets and mask, are
    channels first. For these, it is the layout of torchvision's `deform_conv2d` and ONNX's `DeformConv`.

    Args:
        inputs: Floating-point tensor `(N, H, W, C)`.
        kernel: Floating-point tensor `(kh, kw, C / groups, filters)`. The number of groups is derived from
            this shape; with `C` groups, the convolution is depthwise.
        offsets: Floating-point tensor `(N, Ho, Wo, offset_groups * kh * kw * 2)`, in input pixels: for each
            offset group and each tap (row-major), `dy` and then `dx`.
        mask: Floating-point tensor `(N, Ho, Wo, offset_groups * kh * kw)` that multiplies the samples.
            Defaults to `None`, which is equivalent to a mask of ones.
        bias: Floating-point tensor `(filters,)`. Defaults to `None`, which adds no bias.
        strides: Integer or `(rows, columns)`. Step between output positions, in input pixels. Defaults to
            `1`.
        padding: `"valid"`, `"same"` (as in TensorFlow, with the odd pixel at the end) or
            `((top, bottom), (left, right))`, in pixels. Defaults to `"valid"`.
        dilation_rate: Integer or `(rows, columns)`. Distance between taps, in input pixels. Defaults to `1`.
        offset_groups: Integer. Number of groups of adjacent channels; each group has its own offsets and
            masks. Defaults to `1`.
        data_format: String. `"channels_last"` or `"channels_first"`. Defaults to `None`, which selects
            `keras.config.image_data_format()`.
        implementation: String. `"auto"` uses the fused kernel if it supports the call and the reference
            otherwise. `"native"` requires the fused kernel. `"reference"` never uses it. Defaults to
            `"auto"`.

    Returns:
        Tensor `(N, Ho, Wo, filters)` in the result type of `inputs` and `kernel`. Positions, weights and
        sums are float32, or float64 if the result is float64.

    Raises:
        ValueError: If a shape, dtype or argument is invalid. The message names it.
        RuntimeError: If `implementation="native"` and the fused kernel does not support the call.

    Example:

    >>> x = keras.random.normal((2, 32, 32, 8))
    >>> kernel = keras.random.normal((3, 3, 8, 16))
    >>> offsets = keras.random.normal((2, 32, 32, 3 * 3 * 2))
    >>> mask = keras.random.uniform((2, 32, 32, 3 * 3))
    >>> keras_das.ops.deformable_conv2d(x, kernel, offsets, mask, padding="same").shape
    (2, 32, 32, 16)

    Reference:
        - [Dai et al., 2017](https://arxiv.org/abs/1703.06211), equations 2 and 3 (offsets)
        - [Zhu et al., 2018](https://arxiv.org/abs/1811.11168), equation 1 (mask)
    """
    operation = DeformableConv2DOperation(
        strides, padding, dilation_rate, offset_groups, data_format, implementation
    )
    tensors = (inputs, kernel, offsets, mask, bias)
    if any(isinstance(t, KerasTensor) for t in tensors):
        return operation.symbolic_call(*tensors)
    return operation.call(*tensors)


@keras.saving.register_keras_serializable("keras_das")
class DeformableConv2DOperation(keras.Operation):
    """`deformable_conv2d` with its settings: the operation in functional models and saved files."""

    def __init__(
        self,
        strides: int | Sequence[int] = 1,
        padding: Padding = "valid",
        dilation_rate: int | Sequence[int] = 1,
        offset_groups: int = 1,
        data_format: str | None = None,
        implementation: str = "auto",
        *,
        name: str | None = None,
    ):
        """Validates and stores the settings, which `deformable_conv2d` describes."""
        super().__init__(name=name)
        self.strides = standardize_pair(strides, "strides")
        self.padding = standardize_padding(padding)
        self.dilation_rate = standardize_pair(dilation_rate, "dilation_rate")
        self.offset_groups = standardize_count(offset_groups, "offset_groups")
        self.data_format = standardize_data_format(data_format)
        self.implementation = standardize_implementation(implementation)

    def call(
        self,
        inputs: Tensor,
        kernel: Tensor,
        offsets: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Computes the convolution."""
        tensors = [
            None if t is None else ops.convert_to_tensor(t) for t in (inputs, kernel, offsets, mask, bias)
        ]
        geometry, _ = self._check(*tensors)
        inputs, kernel, offsets, mask, bias = tensors
        dtype = _result_dtype(inputs, kernel)
        compute = self._choose(tensors, dtype)
        if self.data_format == "channels_last":
            return compute(inputs, kernel, offsets, mask, bias, geometry, dtype)
        last = (0, 2, 3, 1)
        output = compute(
            ops.transpose(inputs, last),
            kernel,
            ops.transpose(offsets, last),
            None if mask is None else ops.transpose(mask, last),
            bias,
            geometry,
            dtype,
        )
        return ops.transpose(output, (0, 3, 1, 2))

    def _choose(self, tensors: Sequence[Tensor | None], dtype: str) -> Callable[..., Tensor]:
        """Returns the implementation for this call."""
        if substitute := _substitute.get():
            return substitute
        if self.implementation != "reference" and not native.must_be_portable(tensors):
            named = self.implementation == "native"
            if native.can_use(tensors=tensors, dtype=dtype, raise_error=named):
                return native.deformable_conv2d
        return reference.deformable_conv2d

    def compute_output_spec(
        self,
        inputs: Tensor,
        kernel: Tensor,
        offsets: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> KerasTensor:
        """Infers shape and dtype of the output; sizes can be unknown."""
        _, (batch, height, width, filters) = self._check(inputs, kernel, offsets, mask, bias)
        last = self.data_format == "channels_last"
        shape = (batch, height, width, filters) if last else (batch, filters, height, width)
        return KerasTensor(shape, dtype=_result_dtype(inputs, kernel))

    def _check(
        self, inputs: Tensor, kernel: Tensor, offsets: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Geometry, Shape]:
        """Validates the tensors. Returns the geometry and the channels-last output shape."""
        named = {"inputs": inputs, "kernel": kernel, "offsets": offsets, "mask": mask, "bias": bias}
        for name, tensor in named.items():
            if tensor is not None:
                _check_tensor(name, tensor)
        batch, height, width, channels = self._channels_last(inputs)
        groups = _count_groups(channels, kernel)
        kernel_rows, kernel_columns, depth, filters = tuple(kernel.shape)
        if depth * groups % self.offset_groups:
            raise ValueError(
                f"`offset_groups` must divide the channels of `inputs` ({channels}). "
                f"Received: offset_groups={self.offset_groups}"
            )
        windows = make_windows((kernel_rows, kernel_columns), self.strides, self.dilation_rate, self.padding)
        geometry = Geometry(*windows, groups, self.offset_groups)
        out = [window.output_size(size) for window, size in zip(windows, (height, width), strict=True)]
        if any(size is not None and size < 1 for size in out):
            raise ValueError(
                "`kernel` with its dilation must not be larger than the padded `inputs`. Received: "
                f"kernel.shape={tuple(kernel.shape)}, dilation_rate={self.dilation_rate}, "
                f"padding={self.padding!r}, inputs.shape={tuple(inputs.shape)}"
            )
        samples = self.offset_groups * geometry.taps
        self._check_field("offsets", offsets, (batch, *out, samples * 2))
        if mask is not None:
            self._check_field("mask", mask, (batch, *out, samples))
        if bias is not None and tuple(bias.shape) != (filters,):
            raise ValueError(
                f"`bias` must have shape (filters,) = ({filters},). Received: bias.shape={tuple(bias.shape)}"
            )
        return geometry, (batch, *out, filters)

    def _check_field(self, name: str, tensor: Tensor, expected: Shape) -> None:
        found = self._channels_last(tensor)
        if any(f is not None and e is not None and f != e for f, e in zip(found, expected, strict=True)):
            n, h, w, c = expected
            shape = expected if self.data_format == "channels_last" else (n, c, h, w)
            raise ValueError(
                f"`{name}` must have shape {shape} for these `inputs` and `kernel` "
                f"(data_format={self.data_format!r}, offset_groups={self.offset_groups}). "
                f"Received: {name}.shape={tuple(tensor.shape)}"
            )

    def _channels_last(self, tensor: Tensor) -> Shape:
        if self.data_format == "channels_last":
            return tuple(tensor.shape)
        n, c, h, w = tensor.shape
        return n, h, w, c


def standardize_count(value: int, name: str) -> int:
    """Returns `value` if it is a positive integer, or raises an error that names the argument."""
    count = as_integer(value)
    if count is None or count < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return count


def standardize_positive(value: float, name: str) -> float:
    """Returns `value` as a float if it is a positive number, or raises an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
    return float(value)


def standardize_implementation(implementation: str) -> str:
    """Returns the name of an implementation, or raises a ValueError."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be one of {IMPLEMENTATIONS}. Received: implementation={implementation!r}"
        )
    return implementation


def _result_dtype(inputs: Tensor, kernel: Tensor) -> str:
    """Returns Keras' result type, but keeps float64, which Keras lowers on JAX and torch."""
    dtypes = {keras.backend.standardize_dtype(tensor.dtype) for tensor in (inputs, kernel)}
    return "float64" if "float64" in dtypes else keras.backend.result_type(*dtypes)


def _check_tensor(name: str, tensor: Tensor) -> None:
    rank = 1 if name == "bias" else 4
    if len(tensor.shape) != rank:
        raise ValueError(f"`{name}` must have rank {rank}. Received: {name}.shape={tuple(tensor.shape)}")
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(
            f"`{name}` must be float16, bfloat16, float32 or float64. Received: {name}.dtype={dtype}"
        )


def _count_groups(channels: int | None, kernel: Tensor) -> int:
    shape = tuple(kernel.shape)
    if channels is None or channels < 1:
        raise ValueError(f"`inputs` must have a known, positive number of channels. Received: {channels}")
    if None in shape or 0 in shape:
        raise ValueError(f"`kernel` must have a known shape without zeros. Received: kernel.shape={shape}")
    _, _, depth, filters = shape
    if channels % depth or filters % (channels // depth):
        raise ValueError(
            "`kernel` must have shape (kh, kw, C / groups, filters) with groups dividing both the channels C "
            f"of `inputs` ({channels}) and the filters. Received: kernel.shape={shape}"
        )
    return channels // depth
