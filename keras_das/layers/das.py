"""`DASLayer`: the deformable attention gate."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_das.layers.arguments import standardize_choice, standardize_factor
from keras_das.layers.deformable_conv2d import DeformableConv2D, Identifier, Shape, Tensor
from keras_das.layers.depthwise import DepthwiseConv2D
from keras_das.layers.inputs import check_input
from keras_das.layers.policies import build_layer, check_not_quantized, quantization_of
from keras_das.ops.deformable import standardize_count, standardize_implementation, standardize_positive
from keras_das.ops.geometry import standardize_data_format, standardize_pair

# Those of PyTorch's norms. Keras' own 1e-3 would flatten feature maps of small variance.
_EPSILON = 1e-5
# More channels C' than these make the quadratic form of the folded norm dearer than the norm itself.
_FOLDED_WIDTH = 128
# What a configuration without these entries means: the layer as it was before they existed.
_FORMER_DEFAULTS = {"norm": "channels", "identity_gain": 1.0, "offset_scale": 1.0}


@keras.saving.register_keras_serializable("keras_das")
class DASLayer(keras.layers.Layer):
    """Deformable attention gate: multiplies a feature map by how much each of its values matters.

    The gate sees beyond a convolution's window, for it reads the feature map at positions it has learnt, at
    a cost linear in the number of pixels:

        X_c = GELU(InstanceNorm(X W1))                       (1)  W1: depthwise-separable, C -> C' = alpha C
        deform(p) = sum_k w_k * m_k * X_c(p + p_k + dp_k)    (2)  dp_k and m_k in (0, 1) predicted from X_c
        A = sigmoid(LayerNorm(deform(X_c)))                  (3)  C' -> C channels
        X_out = X * A                                        (4)

    Args:
        reduction: alpha, the share of the channels that the gate works on: `C' = max(1, round(alpha C))`.
        kernel_size: Size of both of the gate's spatial kernels, an integer or `(rows, columns)`.
        dilation_rate: Distance between the deformable kernel's taps in pixels.
        offset_groups: Groups of neighbouring channels of `C'` with offsets and masks of their own.
        modulated: Whether to predict the masks m_k; without them they are 1.
        deformable: `"separable"`: a depthwise deformable convolution, then a pointwise one from C' to C.
            `"dense"`: one deformable convolution from C' to C, with `9 alpha C^2` weights.
        norm: What the layer norm of equation 3 averages over. `"image"`: rows, columns and channels of each
            image, so that the gate can keep or drop a place as a whole. `"channels"`: the channels of each
            pixel. Both have a scale and a shift for each channel. Defaults to `"image"`.
        identity_init: `True`: the gate is `2 * sigmoid`, with a norm whose scale starts at 0, so that it
            starts at exactly 1 and the layer changes nothing until training moves it. `False`: the paper's
            gate. Defaults to `False`.
        identity_gain: Factor before the sigmoid with `identity_init=True`. The scale and the shift of the
            norm start at 0 there, and an optimizer such as Adam moves them by about its learning rate a
            step, so that the gate leaves 1 this many times as fast. Without `identity_init` it has no
            effect. Defaults to `4.0`.
        offset_scale: Factor on the predicted offsets. Below 1 the offsets learn more slowly than the other
            weights: Adam's steps shrink by this factor, those of SGD by its square. With 0 they stay 0.
            Defaults to `1.0`.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras' default.
        implementation: `"auto"`, `"native"` or `"reference"`; see `keras_das.ops.deformable_conv2d`.
        kernel_initializer: Initializer of the convolutions' kernels.
        offset_initializer: Initializer of the kernel that predicts offsets and masks.
        kernel_regularizer: Regularizer of the convolutions' kernels.
        offset_regularizer: Regularizer of the kernel that predicts offsets and masks.
        activity_regularizer: Regularizer of the output.
        kernel_constraint: Constraint on the convolutions' kernels.
        offset_constraint: Constraint on the kernel that predicts offsets and masks.
        **kwargs: `name`, `dtype`, `trainable`, as for every Keras layer.

    Input shape:
        `(N, H, W, C)`, or `(N, C, H, W)` with `data_format="channels_first"`. Floating.

    Output shape:
        The input's.

    Raises:
        ValueError: If an argument is invalid or does not fit the input; the message names it.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((32, 32, 3)),
    ...     keras.layers.Conv2D(64, 3, activation="relu"),
    ...     keras_das.DASLayer(),
    ...     keras.layers.GlobalAveragePooling2D(),
    ...     keras.layers.Dense(10),
    ... ])

    Reference:
        - [Salajegheh et al., 2023](https://arxiv.org/abs/2311.12091), section 3
    """

    def __init__(
        self,
        reduction: float = 0.2,
        kernel_size: int | Sequence[int] = 3,
        dilation_rate: int | Sequence[int] = 1,
        offset_groups: int = 1,
        modulated: bool = True,
        deformable: str = "separable",
        norm: str = "image",
        identity_init: bool = False,
        identity_gain: float = 4.0,
        offset_scale: float = 1.0,
        data_format: str | None = None,
        implementation: str = "auto",
        kernel_initializer: Identifier = "glorot_uniform",
        offset_initializer: Identifier = "zeros",
        kernel_regularizer: Identifier = None,
        offset_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        kernel_constraint: Identifier = None,
        offset_constraint: Identifier = None,
        **kwargs: Any,
    ):
        """Checks and keeps the arguments; the weights are made by `build`."""
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        check_not_quantized(self)
        self._quantization: Mapping[str, Any] = {}  # of the layers inside; `from_config` sets it
        self.reduction = standardize_positive(reduction, "reduction")
        self.kernel_size = standardize_pair(kernel_size, "kernel_size")
        self.dilation_rate = standardize_pair(dilation_rate, "dilation_rate")
        self.offset_groups = standardize_count(offset_groups, "offset_groups")
        self.modulated = modulated
        self.deformable = standardize_choice(deformable, "deformable", ("separable", "dense"))
        self.norm = standardize_choice(norm, "norm", ("image", "channels"))
        self.identity_init = identity_init
        self.identity_gain = standardize_positive(identity_gain, "identity_gain")
        self.offset_scale = standardize_factor(offset_scale, "offset_scale")
        self.data_format = standardize_data_format(data_format)
        self.implementation = standardize_implementation(implementation)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.offset_initializer = initializers.get(offset_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.offset_regularizer = regularizers.get(offset_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.offset_constraint = constraints.get(offset_constraint)
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = True  # the output's pixels are the input's: a mask passes through

    def build(self, input_shape: Shape) -> None:
        """Creates the gate's layers for inputs of this shape."""
        channel_axis = 3 if self.data_format == "channels_last" else 1
        channels = input_shape[channel_axis]
        if channels is None:
            raise ValueError(f"The number of channels must be known. Received: input_shape={input_shape}")
        width = max(1, round(self.reduction * channels))
        if width % self.offset_groups:
            raise ValueError(
                f"`offset_groups` must divide the gate's channels, round({self.reduction} * {channels}) = "
                f"{width}. Received: offset_groups={self.offset_groups}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={channel_axis: channels})
        if channels == 1 and self.norm == "channels":
            warnings.warn(
                f"The gate '{self.name}' is on a map of one channel, over which its layer norm is constant: "
                "it multiplies all pixels by the same number.",
                stacklevel=2,
            )
        self._create_layers(channels, width)
        last = input_shape if channel_axis == 3 else (*input_shape[:1], *input_shape[2:], channels)
        shape = tuple(last)
        for layer in self._gate_layers():
            build_layer(layer, shape, self._quantization)
            shape = layer.compute_output_shape(shape)

    def _create_layers(self, channels: int, width: int) -> None:
        separable = self.deformable == "separable"
        common = {"data_format": "channels_last", "dtype": self.dtype_policy}
        # Ahead of the norm, sums of large features are beyond float16.
        wide = "float32" if self.compute_dtype == "float16" else self.dtype_policy
        weighted = {
            "kernel_regularizer": self.kernel_regularizer,
            "kernel_constraint": self.kernel_constraint,
        }
        self.depthwise = DepthwiseConv2D(
            self.kernel_size,
            padding="same",
            use_bias=False,
            depthwise_initializer=_fresh(self.kernel_initializer),
            depthwise_regularizer=self.kernel_regularizer,
            depthwise_constraint=self.kernel_constraint,
            name="depthwise",
            data_format="channels_last",
            dtype=wide,
        )
        self.depthwise.supports_masking = True  # or it would warn of a mask that this layer hands on
        # The pointwise convolutions are `Dense` on the channels: the same product, and sound for an empty
        # batch, which TensorFlow's oneDNN convolution is not (2.21). The norms after them replace biases.
        self.reduce = keras.layers.Dense(
            width,
            use_bias=False,
            kernel_initializer=_fresh(self.kernel_initializer),
            name="reduce",
            dtype=wide,
            **weighted,
        )
        self.instance_norm = keras.layers.GroupNormalization(
            groups=-1, axis=-1, epsilon=_EPSILON, name="instance_norm", dtype=wide
        )
        self.deform = DeformableConv2D(
            width if separable else channels,
            self.kernel_size,
            padding="same",
            dilation_rate=self.dilation_rate,
            groups=width if separable else 1,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            offset_scale=self.offset_scale,
            use_bias=not separable,
            kernel_initializer=_fresh(self.kernel_initializer),
            offset_initializer=_fresh(self.offset_initializer),
            offset_regularizer=self.offset_regularizer,
            offset_constraint=self.offset_constraint,
            implementation=self.implementation,
            name="deform",
            **common,
            **weighted,
        )
        self.expand = None
        if separable:
            self.expand = keras.layers.Dense(
                channels,
                use_bias=False,
                kernel_initializer=_fresh(self.kernel_initializer),
                name="expand",
                dtype=self.dtype_policy,
                **weighted,
            )
        norm, axes = keras.layers.LayerNormalization, {"axis": -1}
        if self.norm == "image":
            norm, axes = keras.layers.GroupNormalization, {"axis": -1, "groups": 1}
        self.layer_norm = norm(
            epsilon=_EPSILON,
            gamma_initializer="zeros" if self.identity_init else "ones",
            name="layer_norm",
            dtype=self.dtype_policy,
            **axes,
        )

    def _gate_layers(self) -> list[keras.layers.Layer]:
        """The layers between the input and the sigmoid, in the order of equations 1 to 3."""
        layers = (
            self.depthwise,
            self.reduce,
            self.instance_norm,
            self.deform,
            self.expand,
            self.layer_norm,
        )
        return [layer for layer in layers if layer is not None]

    def gate(self, inputs: Tensor) -> Tensor:
        """The attention map A of equation 3.

        Args:
            inputs: Tensor of the layer's input shape.

        Returns:
            Tensor of the input's shape, in (0, 1), or in (0, 2) with `identity_init`.
        """
        if not self.built:
            self.build(tuple(inputs.shape))
        gate = ops.sigmoid(self._logits(self._channels_last(inputs)))
        if self.identity_init:
            gate = 2 * gate
        return ops.transpose(gate, (0, 3, 1, 2)) if self.data_format == "channels_first" else gate

    def _logits(self, x: Tensor) -> Tensor:
        """The argument of the sigmoid in equation 3, channels last."""
        return self._expand_and_normalize(self.deform(self._deformable_input(x)))

    def _deformable_input(self, x: Tensor) -> Tensor:
        """X_c of equation 1, channels last."""
        return ops.gelu(self.instance_norm(self.reduce(self.depthwise(x))), approximate=False)

    def _expand_and_normalize(self, x: Tensor) -> Tensor:
        """The norm of `x W`, with as few passes over the C channels as possible.

        The mean over channels of `x W` is 0 if each row of W has mean 0, and subtracting the rows' means from
        W is the same as subtracting that mean from `x W`. The variance is then a quadratic form of the C'
        channels of x, with the matrix `W W^T / C`. Where these are few, the norm is folded into the product.
        """
        dtype = keras.backend.result_type(x.dtype, "float32")
        scale, shift = (ops.cast(weight, dtype) for weight in (self.layer_norm.gamma, self.layer_norm.beta))
        if self.identity_init:
            scale, shift = scale * self.identity_gain, shift * self.identity_gain
        if self.expand is None or self.expand.quantization_mode is not None:
            x = ops.cast(x if self.expand is None else self.expand(x), dtype)
            x = self._normalize(x - ops.mean(x, axis=self._norm_axes(), keepdims=True), scale)
            return x + ops.cast(shift, self.compute_dtype)
        kernel = ops.cast(self.expand.kernel, dtype)
        if self.norm == "image":
            return self._image_norm_of_product(ops.cast(x, dtype), kernel, scale, shift)
        kernel = kernel - ops.mean(kernel, axis=1, keepdims=True)
        if self._folds(kernel):
            x = ops.cast(x, dtype)
            variance = ops.sum(ops.matmul(x, _gram(kernel)) * x, axis=-1, keepdims=True)
            x = self._product(x * _inverse_deviation(variance), kernel * scale)
        else:
            x = self._normalize(ops.cast(self._product(x, kernel), dtype), scale)
        return x + ops.cast(shift, self.compute_dtype)

    def _image_norm_of_product(self, x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The norm of `x W` over each image.

        `x W` is split into that of x's deviation from its mean over places, and that of this mean, which is
        one vector an image. Their squares add up, and neither suffers from a large common offset.
        """
        place = ops.mean(x, axis=(1, 2), keepdims=True)
        x = x - place
        common = ops.matmul(place, kernel - ops.mean(kernel, axis=1, keepdims=True))
        variance = ops.mean(ops.square(common), axis=-1, keepdims=True)
        if self._folds(kernel):
            spread = ops.sum(ops.matmul(x, _gram(kernel)) * x, axis=-1, keepdims=True)
            scaling = _inverse_deviation(variance + ops.mean(spread, axis=(1, 2), keepdims=True))
            x = self._product(x * scaling, kernel * scale)
        else:
            x = ops.cast(self._product(x, kernel), x.dtype)
            spread = ops.mean(ops.square(x), axis=(1, 2, 3), keepdims=True)
            scaling = _inverse_deviation(variance + spread)
            x = ops.cast(x * (scaling * scale), self.compute_dtype)
        return x + ops.cast(common * scaling * scale + shift, self.compute_dtype)

    def _normalize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Brings x, whose mean is 0, to the scale's deviation."""
        variance = ops.mean(ops.square(x), axis=self._norm_axes(), keepdims=True)
        return ops.cast(x * (_inverse_deviation(variance) * scale), self.compute_dtype)

    def _norm_axes(self) -> tuple[int, ...]:
        return (1, 2, 3) if self.norm == "image" else (3,)

    @staticmethod
    def _folds(kernel: Tensor) -> bool:
        width, channels = kernel.shape
        return width <= min(_FOLDED_WIDTH, channels / 2)

    def _product(self, x: Tensor, kernel: Tensor) -> Tensor:
        return ops.matmul(ops.cast(x, self.compute_dtype), ops.cast(kernel, self.compute_dtype))

    def _channels_last(self, inputs: Tensor) -> Tensor:
        x = ops.cast(inputs, self.compute_dtype)
        return ops.transpose(x, (0, 2, 3, 1)) if self.data_format == "channels_first" else x

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Checks the input, of whatever kind, and calls the layer."""
        check_input(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Multiplies the feature map by its gate."""
        return inputs * self.gate(inputs)

    def predict_offsets(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the gate reads the feature map; see `DeformableConv2D.predict_offsets`.

        Args:
            inputs: Tensor of the layer's input shape.

        Returns:
            `(offsets, mask)`, channels last.
        """
        if not self.built:
            self.build(tuple(inputs.shape))
        return self.deform.predict_offsets(self._deformable_input(self._channels_last(inputs)))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialized."""
        config = {
            "reduction": self.reduction,
            "kernel_size": self.kernel_size,
            "dilation_rate": self.dilation_rate,
            "offset_groups": self.offset_groups,
            "modulated": self.modulated,
            "deformable": self.deformable,
            "norm": self.norm,
            "identity_init": self.identity_init,
            "identity_gain": self.identity_gain,
            "offset_scale": self.offset_scale,
            "data_format": self.data_format,
            "implementation": self.implementation,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "offset_initializer": initializers.serialize(self.offset_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "offset_regularizer": regularizers.serialize(self.offset_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "offset_constraint": constraints.serialize(self.offset_constraint),
        }
        quantization = quantization_of(self._gate_layers()) if self.built else self._quantization
        if quantization:
            config["quantization"] = quantization
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DASLayer":
        """Makes a layer of the `get_config` of this or an earlier version, quantized as that layer is."""
        config = {**_FORMER_DEFAULTS, **config}
        quantization = config.pop("quantization", {})
        layer = super().from_config(config)
        layer._quantization = quantization
        return layer


def _gram(kernel: Tensor) -> Tensor:
    """`W W^T / C`: with it, the mean over channels of the square of `x W` is a quadratic form of x."""
    return ops.matmul(kernel, ops.transpose(kernel)) / kernel.shape[1]


def _inverse_deviation(variance: Tensor) -> Tensor:
    return ops.rsqrt(ops.maximum(variance, 0) + _EPSILON)  # rounding may take a variance below 0


def _fresh(initializer: Any) -> Any:
    """A copy to hand to one weight: a Keras initializer used twice gives the same numbers twice."""
    return initializer.clone() if isinstance(initializer, initializers.Initializer) else initializer
