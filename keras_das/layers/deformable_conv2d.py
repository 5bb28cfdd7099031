"""`DeformableConv2D`: a convolution that predicts its sampling positions from its input."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import activations, constraints, initializers, ops, regularizers

from keras_das.layers.arguments import (
    check_input,
    check_not_symbolic,
    standardize_factor,
    standardize_flag,
)
from keras_das.layers.quantization import check_not_quantized
from keras_das.ops import dilated
from keras_das.ops.arguments import (
    Settings,
    standardize_count,
    standardize_data_format,
    standardize_implementation,
    standardize_padding,
    standardize_pair,
)
from keras_das.ops.deformable import compute
from keras_das.ops.geometry import Padding, Window, batch_inferred, make_windows

Tensor = Any
Shape = tuple[int | None, ...]
Identifier = str | dict | Callable | None


@keras.saving.register_keras_serializable("keras_das")
class DeformableConv2D(keras.layers.Layer):
    """2-D convolution that samples its input at predicted positions.

    A plain convolution, the predictor, computes an offset `(dy, dx)` for every output position and tap and,
    if `modulated`, a mask in (0, 1). The input is sampled at these positions by bilinear interpolation. The
    samples are multiplied by the mask and the kernel and summed. The predictor is initialized to zero: all
    offsets are 0 and all masks are 0.5.

    With `groups` equal to the number of input channels, the convolution is depthwise.

    Args:
        filters: Integer. Number of output channels.
        kernel_size: Integer or `(rows, columns)`. Size of the kernel.
        strides: Integer or `(rows, columns)`. Step between output positions, in input pixels. As in
            `keras.layers.Conv2D`, strides and dilation cannot both be larger than 1. Defaults to `1`.
        padding: `"valid"`, `"same"` or `((top, bottom), (left, right))`, in pixels. Defaults to `"valid"`.
        data_format: String. `"channels_last"` or `"channels_first"`. Defaults to `None`, which selects
            `keras.config.image_data_format()`.
        dilation_rate: Integer or `(rows, columns)`. Distance between taps, in input pixels. Defaults to `1`.
        groups: Integer. Number of groups of channels that are convolved separately. Defaults to `1`.
        offset_groups: Integer. Number of groups of adjacent channels; each group has its own offsets and
            masks. Defaults to `1`.
        modulated: Boolean. Whether to predict a mask too (Deformable ConvNets v2). Defaults to `True`.
        activation: Activation function of the output. Defaults to `None`.
        use_bias: Boolean. Whether to add a bias. Defaults to `True`.
        kernel_initializer: Initializer for the kernel. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer for the bias. Defaults to `"zeros"`.
        offset_initializer: Initializer for the kernel of the predictor. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer for the kernel. Defaults to `None`.
        bias_regularizer: Regularizer for the bias. Defaults to `None`.
        offset_regularizer: Regularizer for the kernel of the predictor. Defaults to `None`.
        activity_regularizer: Regularizer for the output. Defaults to `None`.
        kernel_constraint: Constraint for the kernel. Defaults to `None`.
        bias_constraint: Constraint for the bias. Defaults to `None`.
        offset_constraint: Constraint for the kernel of the predictor. Defaults to `None`.
        implementation: String. `"auto"`, `"native"` or `"reference"`; see
            `keras_das.ops.deformable_conv2d`. Defaults to `"auto"`.
        offset_scale: Non-negative float. Factor on the predicted offsets. Below 1, offsets learn more slowly
            than the other weights: steps of Adam shrink by this factor, steps of SGD by its square. With 0,
            offsets stay 0. Defaults to `1.0`.
        **kwargs: Arguments of every Keras layer: `name`, `dtype`, `trainable`.

    Input shape:
        `(N, H, W, C)`, or `(N, C, H, W)` with `data_format="channels_first"`. Floating point. The layer
        computes in the compute dtype of its policy; positions and sums are at least float32.

    Output shape:
        `(N, Ho, Wo, filters)`, or `(N, filters, Ho, Wo)`, with the sizes of `keras.layers.Conv2D`.

    Raises:
        ValueError: If an argument is invalid or does not fit the input. The message names it.
        RuntimeError: If `implementation="native"` and the fused kernels do not support the call.

    Example:

    >>> x = keras.random.normal((4, 28, 28, 3))
    >>> keras_das.DeformableConv2D(16, 3, padding="same", activation="relu")(x).shape
    (4, 28, 28, 16)

    Reference:
        - [Dai et al., 2017](https://arxiv.org/abs/1703.06211), section 2.1
        - [Zhu et al., 2018](https://arxiv.org/abs/1811.11168), section 3.2 (modulated)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: Padding = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = True,
        activation: Identifier = None,
        use_bias: bool = True,
        kernel_initializer: Identifier = "glorot_uniform",
        bias_initializer: Identifier = "zeros",
        offset_initializer: Identifier = "zeros",
        kernel_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        offset_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        kernel_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        offset_constraint: Identifier = None,
        implementation: str = "auto",
        offset_scale: float = 1.0,
        **kwargs: Any,
    ):
        """Validates and stores the arguments. `build` creates the weights."""
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        check_not_quantized(self)
        self.filters = standardize_count(filters, "filters")
        self.kernel_size = standardize_pair(kernel_size, "kernel_size")
        self.strides = standardize_pair(strides, "strides")
        self.padding = standardize_padding(padding)
        self.data_format = standardize_data_format(data_format)
        self.dilation_rate = standardize_pair(dilation_rate, "dilation_rate")
        self.groups = standardize_count(groups, "groups")
        self.offset_groups = standardize_count(offset_groups, "offset_groups")
        self.modulated = standardize_flag(modulated, "modulated")
        self.offset_scale = standardize_factor(offset_scale, "offset_scale")
        self.activation = activations.get(activation)
        self.use_bias = standardize_flag(use_bias, "use_bias")
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.offset_initializer = initializers.get(offset_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.offset_regularizer = regularizers.get(offset_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.offset_constraint = constraints.get(offset_constraint)
        self.implementation = standardize_implementation(implementation)
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = True  # masks are accepted and not passed on; see compute_mask
        self._check_arguments()

    def _check_arguments(self) -> None:
        if self.filters % self.groups:
            raise ValueError(
                f"`groups` must divide `filters`. Received: groups={self.groups}, filters={self.filters}"
            )
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "`strides` and `dilation_rate` cannot both be larger than 1. "
                f"Received: strides={self.strides}, dilation_rate={self.dilation_rate}"
            )

    @property
    def taps(self) -> int:
        """Number of kernel positions."""
        return self.kernel_size[0] * self.kernel_size[1]

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Creates the weights for inputs of this shape."""
        channel_axis = 3 if self.data_format == "channels_last" else 1
        channels = input_shape[channel_axis]
        for name in ("groups", "offset_groups"):
            if channels is None or channels % getattr(self, name):
                raise ValueError(
                    f"`{name}` must divide the number of input channels, which must be known. "
                    f"Received: {name}={getattr(self, name)}, input_shape={tuple(input_shape)}"
                )
        self.compute_output_shape(input_shape)  # raises if the kernel does not fit
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={channel_axis: channels})
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*self.kernel_size, channels // self.groups, self.filters),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.filters,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        predictions = self.offset_groups * self.taps * (3 if self.modulated else 2)
        self.offset_kernel = self.add_weight(
            name="offset_kernel",
            shape=(*self.kernel_size, channels, predictions),
            initializer=self.offset_initializer,
            regularizer=self.offset_regularizer,
            constraint=self.offset_constraint,
        )
        self.offset_bias = self.add_weight(name="offset_bias", shape=(predictions,), initializer="zeros")

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Validates the input, which may be symbolic, and calls the layer."""
        check_input(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Predicts offsets and mask, and convolves the input."""
        # Channels last throughout, as TensorFlow's CPU convolutions and the sampling require.
        if self.data_format == "channels_first":
            inputs = ops.transpose(inputs, (0, 2, 3, 1))
        offsets, mask = self._predict(inputs)
        settings = Settings(
            self.strides,
            self.padding,
            self.dilation_rate,
            self.offset_groups,
            data_format="channels_last",
            implementation=self.implementation,
        )
        outputs = compute(settings, inputs, self.kernel, offsets, mask, self.bias)
        if self.data_format == "channels_first":
            outputs = ops.transpose(outputs, (0, 3, 1, 2))
        return outputs if self.activation is None else self.activation(outputs)

    def predict_offsets(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts where the layer samples `inputs`, and the factor of each sample.

        Args:
            inputs: Tensor of the layer's input shape.

        Returns:
            `(offsets, mask)`, channels last. The offsets have shape `(N, Ho, Wo, offset_groups * taps * 2)`,
            in input pixels, `dy` before `dx`. The mask has shape `(N, Ho, Wo, offset_groups * taps)`, or is
            `None` if the layer is not modulated.

        Raises:
            ValueError: If `inputs` is symbolic.
        """
        check_not_symbolic(inputs, "predict_offsets")
        if not self.built:
            self.build(tuple(inputs.shape))
        inputs = ops.cast(inputs, self.compute_dtype)
        if self.data_format == "channels_first":
            inputs = ops.transpose(inputs, (0, 2, 3, 1))
        return self._predict(inputs)

    def _predict(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, height, width, _ = ops.shape(inputs)
        rows, columns = windows = self._windows()
        grid = (batch, rows.output_size(height), columns.output_size(width))
        padding = self.padding
        if not isinstance(padding, str):
            inputs, padding = ops.pad(inputs, ((0, 0), *padding, (0, 0))), "valid"
        predictions = dilated.convolution(
            inputs, ops.cast(self.offset_kernel, inputs.dtype), windows, padding
        )
        # A matrix, because TensorFlow's oneDNN convolution returns the wrong shape for an empty batch (2.21).
        positions = grid[0] * grid[1] * grid[2]
        predictions = ops.reshape(predictions, batch_inferred((positions, self.offset_bias.shape[0])))
        predictions = predictions + ops.cast(self.offset_bias, inputs.dtype)
        count = self.offset_groups * self.taps * 2
        offsets, mask = predictions, None
        if self.modulated:
            # Not two slices, whose gradients would be padded and added.
            offsets, mask = ops.split(predictions, [count], axis=1)
            mask = ops.reshape(ops.sigmoid(mask), batch_inferred((*grid, count // 2)))
        offsets = ops.reshape(offsets, batch_inferred((*grid, count)))
        if self.offset_scale != 1:
            offsets = offsets * ops.cast(self.offset_scale, offsets.dtype)
        return offsets, mask

    def _windows(self) -> tuple[Window, Window]:
        return make_windows(self.kernel_size, self.strides, self.dilation_rate, self.padding)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the output shape; raises a ValueError if the kernel is larger than the padded input."""
        last = self.data_format == "channels_last"
        sizes = input_shape[1:3] if last else input_shape[2:4]
        out = tuple(window.output_size(size) for window, size in zip(self._windows(), sizes, strict=True))
        if any(size is not None and size < 1 for size in out):
            raise ValueError(
                "`kernel_size` with its dilation must not be larger than the padded input. Received: "
                f"kernel_size={self.kernel_size}, dilation_rate={self.dilation_rate}, "
                f"padding={self.padding!r}, input_shape={tuple(input_shape)}"
            )
        return (input_shape[0], *out, self.filters) if last else (input_shape[0], self.filters, *out)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None = None) -> None:
        """Returns `None`: a mask on the input does not describe the sampled positions."""
        return None

    def get_config(self) -> dict[str, Any]:
        """Returns the serialized arguments of the constructor."""
        config = {
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "offset_groups": self.offset_groups,
            "modulated": self.modulated,
            "offset_scale": self.offset_scale,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "offset_initializer": initializers.serialize(self.offset_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "offset_regularizer": regularizers.serialize(self.offset_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
            "offset_constraint": constraints.serialize(self.offset_constraint),
            "implementation": self.implementation,
        }
        return {**super().get_config(), **config}
