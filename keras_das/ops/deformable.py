"""`deformable_conv2d`: validates the arguments, chooses an implementation and calls it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import KerasTensor, ops

from keras_das.ops import native, reference
from keras_das.ops.arguments import Settings, standardize_settings
from keras_das.ops.contract import Plan, make_plan
from keras_das.ops.geometry import Padding

Tensor = Any

_substitute: contextvars.ContextVar[Callable[..., Tensor] | None] = contextvars.ContextVar(
    "keras_das_substitute", default=None
)


@contextlib.contextmanager
def substituted(compute: Callable[..., Tensor]) -> Iterator[None]:
    """Context manager: `compute` computes every deformable convolution of this thread, for exports.

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

    Samples with `y <= -1`, `y >= H`, `x <= -1` or `x >= W` are 0 and pass no gradient. For all
    others, pixels outside the image count as 0. A NaN in an offset makes that output position NaN. At integer
    positions, the gradient with respect to an offset is the slope towards the next pixel, to the right or
    downwards. With zero offsets and no mask, the result is that of `keras.ops.conv`.

    With `data_format="channels_first"`, all 4-D tensors except the kernel, including offsets and mask, are
    channels first, as in torchvision's `deform_conv2d` and ONNX's `DeformConv`.

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
        implementation: String. `"auto"` uses the fused kernels if they support the call and the reference
            otherwise. `"native"` raises an error if they do not support it. `"reference"` never uses them.
            Defaults to `"auto"`.

    Returns:
        Tensor `(N, Ho, Wo, filters)` in the result type of `inputs` and `kernel`. Positions,
        interpolation weights and sums are float32, or float64 if the result is float64.

    Raises:
        ValueError: If a shape, dtype or argument is invalid. The message names it.
        RuntimeError: If `implementation="native"` and the fused kernels do not support the call.

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
    settings = standardize_settings(
        strides, padding, dilation_rate, offset_groups, data_format, implementation
    )
    tensors = (inputs, kernel, offsets, mask, bias)
    if any(isinstance(t, KerasTensor) for t in tensors):
        return DeformableConv2DOperation(*settings).symbolic_call(*tensors)
    return compute(settings, *tensors, check_sizes=True)


def compute(
    settings: Settings,
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    check_sizes: bool = False,
) -> Tensor:
    """Computes `deformable_conv2d` for standardized settings and tensors that are not symbolic.

    `check_sizes` adds checks to TensorFlow graphs for the sizes of offsets and mask that are not known yet.
    """
    given = [None if t is None else _to_tensor(t) for t in (inputs, kernel, offsets, mask, bias)]
    plan = make_plan(settings, *given)
    if check_sizes and keras.backend.backend() == "tensorflow":
        _check_sizes_in_graph(settings, plan, given)
    convolve = _choose(settings.implementation, given)
    if settings.data_format == "channels_last":
        return convolve(*given, plan.geometry, plan.output.dtype)
    inputs, kernel, offsets, mask, bias = given
    last = (0, 2, 3, 1)
    output = convolve(
        ops.transpose(inputs, last),
        kernel,
        ops.transpose(offsets, last),
        None if mask is None else ops.transpose(mask, last),
        bias,
        plan.geometry,
        plan.output.dtype,
    )
    return ops.transpose(output, (0, 3, 1, 2))


def _check_sizes_in_graph(settings: Settings, plan: Plan, tensors: Sequence[Tensor | None]) -> None:
    """Adds checks of unknown sizes to the graph that TensorFlow traces, unless it is exported."""
    import tensorflow as tf

    known = tf.executing_eagerly() or all(t is None or t.shape.is_fully_defined() for t in tensors)
    if known or native.must_be_portable(tensors):
        return
    axes = [0, 1, 2] if settings.data_format == "channels_last" else [0, 2, 3]
    inputs, _, offsets, mask, _ = tensors
    batch, height, width = (tf.shape(inputs)[axis] for axis in axes)
    wanted = (batch, plan.geometry.rows.output_size(height), plan.geometry.columns.output_size(width))
    for name, field in (("offsets", offsets), ("mask", mask)):
        if field is not None:
            tf.debugging.assert_equal(
                tf.gather(tf.shape(field), axes),
                tf.stack(wanted),
                f"`{name}` must have the batch size of `inputs` and the rows and columns of the output",
            )


def _to_tensor(value: Any) -> Tensor:
    # `convert_to_tensor` returns a Keras variable as it is, which costs TensorFlow a slow conversion later.
    return value.value if isinstance(value, keras.Variable) else ops.convert_to_tensor(value)


def _choose(implementation: str, tensors: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """Returns the implementation for a call, a function like `reference.deformable_conv2d`."""
    if substitute := _substitute.get():
        return substitute
    if implementation == "reference" or native.must_be_portable(tensors):
        return reference.deformable_conv2d
    if native.can_use(tensors=tensors, raise_error=implementation == "native"):
        return native.deformable_conv2d
    return reference.deformable_conv2d


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
        self.settings = standardize_settings(
            strides, padding, dilation_rate, offset_groups, data_format, implementation
        )

    def call(
        self,
        inputs: Tensor,
        kernel: Tensor,
        offsets: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Computes the convolution."""
        return compute(self.settings, inputs, kernel, offsets, mask, bias, check_sizes=True)

    def compute_output_spec(
        self,
        inputs: Tensor,
        kernel: Tensor,
        offsets: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> KerasTensor:
        """Infers shape and dtype of the output; sizes can be unknown."""
        shape, dtype = make_plan(self.settings, inputs, kernel, offsets, mask, bias).output
        return KerasTensor(shape, dtype=dtype)
