"""`DeformableConv2D`: a convolution that predicts from its input where to read it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import activations, constraints, initializers, ops, regularizers

from keras_das.layers.arguments import standardize_factor
from keras_das.layers.inputs import check_input
from keras_das.layers.policies import check_not_quantized
from keras_das.ops import deformable_conv2d
from keras_das.ops.deformable import standardize_count, standardize_implementation
from keras_das.ops.geometry import (
    Padding,
    Window,
    make_windows,
    standardize_data_format,
    standardize_padding,
    standardize_pair,
)

Tensor = Any
Shape = tuple[int | None, ...]
Identifier = str | dict | Callable | None


@keras.saving.register_keras_serializable("keras_das")
class DeformableConv2D(keras.layers.Layer):
    """2-D convolution that reads its input at positions it predicts from it.

    A plain convolution (the predictor) gives, for every output position and tap, an offset `(dy, dx)` and,
    if `modulated`, a mask in (0, 1). The sampled values, by bilinear interpolation, are multiplied by the
    mask and the kernel and added up. The predictor starts at zero: all offsets are 0 and all masks 0.5.

    `groups == channels` gives the depthwise form.

    Args:
        filters: Number of output channels.
        kernel_size: Size of the kernel, an integer or `(rows, columns)`.
        strides: Step between output positions in input pixels, an integer or `(rows, columns)`. As in
            `keras.layers.Conv2D`, strides and dilation cannot both be larger than 1.
        padding: `"valid"`, `"same"` or `((top, bottom), (left, right))` in pixels.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras' default.
        dilation_rate: Distance between taps in input pixels, an integer or `(rows, columns)`.
        groups: Number of groups of channels that are convolved apart from each other.
        offset_groups: Number of groups of neighbouring channels with offsets and masks of their own.
        modulated: Whether to predict a mask too (Deformable ConvNets v2).
        activation: Activation function applied to the output, or `None`.
        use_bias: Whether to add a bias.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        offset_initializer: Initializer of the predictor's kernel.
        kernel_regularizer: Regularizer of the kernel.
        bias_regularizer: Regularizer of the bias.
        offset_regularizer: Regularizer of the predictor's kernel.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint on the kernel.
        bias_constraint: Constraint on the bias.
        offset_constraint: Constraint on the predictor's kernel.
        implementation: `"auto"`, `"native"` or `"reference"`; see `keras_das.ops.deformable_conv2d`.
        offset_scale: Factor on the predicted offsets. Below 1 the offsets learn more slowly than the other
            weights: Adam's steps shrink by this factor, those of SGD by its square. With 0 they stay 0.
            Defaults to `1.0`.
        **kwargs: `name`, `dtype`, `trainable`, as for every Keras layer.

    Input shape:
        `(N, H, W, C)`, or `(N, C, H, W)` with `data_format="channels_first"`. Floating; the layer computes
        in its dtype policy's compute dtype, positions and sums in float32 at least.

    Output shape:
        `(N, Ho, Wo, filters)`, or `(N, filters, Ho, Wo)`, sizes as in `keras.layers.Conv2D`.

    Raises:
        ValueError: If an argument is invalid or does not fit the input; the message names it.

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
        """Checks and keeps the arguments; the weights are made by `build`."""
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
        self.modulated = modulated
        self.offset_scale = standardize_factor(offset_scale, "offset_scale")
        self.activation = activations.get(activation)
        self.use_bias = use_bias
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
        self.supports_masking = True  # masks are accepted, and end here: see compute_mask
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
        self.compute_output_shape(input_shape)  # raises where the kernel does not fit
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
        """Checks the input, of whatever kind, and calls the layer."""
        check_input(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Predicts offsets and mask, and convolves."""
        # Channels last throughout: TensorFlow's CPU convolutions and the sampling want it.
        if self.data_format == "channels_first":
            inputs = ops.transpose(inputs, (0, 2, 3, 1))
        offsets, mask = self._predict(inputs)
        outputs = deformable_conv2d(
            inputs,
            self.kernel,
            offsets,
            mask,
            self.bias,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            offset_groups=self.offset_groups,
            data_format="channels_last",
            implementation=self.implementation,
        )
        if self.data_format == "channels_first":
            outputs = ops.transpose(outputs, (0, 3, 1, 2))
        return outputs if self.activation is None else self.activation(outputs)

    def predict_offsets(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the layer reads `inputs`, and how much it makes of each sample.

        Args:
            inputs: Tensor of the layer's input shape.

        Returns:
            `(offsets, mask)`, channels last: `(N, Ho, Wo, offset_groups * taps * 2)` in input pixels, `dy`
            before `dx`, and `(N, Ho, Wo, offset_groups * taps)`, or `None` where the layer is not modulated.
        """
        if not self.built:
            self.build(tuple(inputs.shape))
        inputs = ops.cast(inputs, self.compute_dtype)
        if self.data_format == "channels_first":
            inputs = ops.transpose(inputs, (0, 2, 3, 1))
        return self._predict(inputs)

    def _predict(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, height, width, _ = ops.shape(inputs)
        rows, columns = self._windows()
        grid = (batch, rows.output_size(height), columns.output_size(width))
        padding = self.padding
        if not isinstance(padding, str):
            inputs, padding = ops.pad(inputs, ((0, 0), *padding, (0, 0))), "valid"
        predictions = ops.conv(
            inputs,
            ops.cast(self.offset_kernel, inputs.dtype),
            strides=self.strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )
        # As a matrix, because TensorFlow's oneDNN convolution gives an empty batch the wrong shape (2.21).
        positions = grid[0] * grid[1] * grid[2]
        predictions = ops.reshape(predictions, (positions, self.offset_bias.shape[0]))
        predictions = predictions + ops.cast(self.offset_bias, inputs.dtype)
        count = self.offset_groups * self.taps * 2
        offsets = ops.reshape(predictions[:, :count], (*grid, count))
        if self.offset_scale != 1:
            offsets = offsets * ops.cast(self.offset_scale, offsets.dtype)
        if not self.modulated:
            return offsets, None
        return offsets, ops.reshape(ops.sigmoid(predictions[:, count:]), (*grid, count // 2))

    def _windows(self) -> tuple[Window, Window]:
        return make_windows(self.kernel_size, self.strides, self.dilation_rate, self.padding)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Output shape for inputs of this shape; raises a ValueError if the kernel does not fit."""
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
        """A mask on the input says nothing about positions read elsewhere: it ends here."""
        return None

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialized."""
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
