"""`DASLayer`: the deformable attention gate."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_das.layers import folded_norm
from keras_das.layers.arguments import (
    check_input,
    check_not_symbolic,
    standardize_choice,
    standardize_factor,
    standardize_flag,
)
from keras_das.layers.deformable_conv2d import DeformableConv2D, Identifier, Shape, Tensor
from keras_das.layers.depthwise import DepthwiseConv2D
from keras_das.layers.quantization import build_layer, check_not_quantized, quantization_of
from keras_das.ops import pointwise
from keras_das.ops.arguments import (
    standardize_count,
    standardize_data_format,
    standardize_implementation,
    standardize_pair,
    standardize_positive,
)
from keras_das.ops.native import must_be_portable

# Values for configurations that were saved before these arguments existed.
_FORMER_DEFAULTS = {"norm": "channels", "identity_gain": 1.0, "offset_scale": 1.0}


@keras.saving.register_keras_serializable("keras_das")
class DASLayer(keras.layers.Layer):
    """Deformable attention gate: multiplies each value of a feature map by a learned weight.

    The gate samples the feature map at learned positions, so its receptive field extends beyond the window
    of a convolution. Its cost is linear in the number of pixels:

        X_c = GELU(InstanceNorm(X W1))                       (1)  W1: depthwise-separable, C -> C' = alpha C
        deform(p) = sum_k w_k * m_k * X_c(p + p_k + dp_k)    (2)  dp_k and m_k in (0, 1) predicted from X_c
        A = sigmoid(LayerNorm(deform(X_c)))                  (3)  C' -> C channels
        X_out = X * A                                        (4)

    Args:
        reduction: Positive float. The factor alpha that sets the number of channels inside the gate,
            `C' = max(1, round(alpha C))`. Defaults to `0.2`.
        kernel_size: Integer or `(rows, columns)`. Size of both spatial kernels of the gate. Defaults to `3`.
        dilation_rate: Integer or `(rows, columns)`. Distance between the taps of the deformable kernel, in
            pixels. Defaults to `1`.
        offset_groups: Integer. Number of groups of adjacent channels of `C'`; each group has its own offsets
            and masks. Defaults to `1`.
        modulated: Boolean. Whether to predict the masks m_k. If `False`, they are 1. Defaults to `True`.
        deformable: String. `"separable"` is a depthwise deformable convolution followed by a pointwise
            convolution from C' to C. `"dense"` is one deformable convolution from C' to C, with
            `9 alpha C^2` weights. Defaults to `"separable"`.
        norm: String. The axes of the layer norm in equation 3. `"image"` normalizes over the rows, columns
            and channels of each image, so the gate can keep or suppress a location as a whole. `"channels"`
            normalizes over the channels of each pixel. Both have a scale and a shift per channel. Defaults
            to `"image"`.
        identity_init: Boolean. If `True`, the gate is `2 * sigmoid` and the scale of its norm starts at 0,
            so the gate is exactly 1 and the layer is the identity until it is trained. If `False`, the gate
            is `sigmoid`, as in the paper, and starts near 0.5. Defaults to `False`.
        identity_gain: Positive float. Factor on the argument of the sigmoid if `identity_init=True`. The
            scale and the shift of the norm then start at 0, and an optimizer such as Adam changes them by
            about its learning rate per step; with the gain, the gate moves away from 1 faster by this factor.
            Has no effect without `identity_init`. Defaults to `4.0`.
        offset_scale: Non-negative float. Factor on the predicted offsets. Below 1, offsets learn more slowly
            than the other weights: steps of Adam shrink by this factor, steps of SGD by its square. With 0,
            offsets stay 0. Defaults to `1.0`.
        data_format: String. `"channels_last"` or `"channels_first"`. Defaults to `None`, which selects
            `keras.config.image_data_format()`.
        implementation: String. `"auto"`, `"native"` or `"reference"`; see
            `keras_das.ops.deformable_conv2d`. Defaults to `"auto"`.
        kernel_initializer: Initializer for the kernels of the convolutions. Defaults to `"glorot_uniform"`.
        offset_initializer: Initializer for the kernel that predicts offsets and masks. Defaults to
            `"zeros"`.
        kernel_regularizer: Regularizer for the kernels of the convolutions. Defaults to `None`.
        offset_regularizer: Regularizer for the kernel that predicts offsets and masks. Defaults to `None`.
        activity_regularizer: Regularizer for the output. Defaults to `None`.
        kernel_constraint: Constraint for the kernels of the convolutions. Defaults to `None`.
        offset_constraint: Constraint for the kernel that predicts offsets and masks. Defaults to `None`.
        **kwargs: Arguments of every Keras layer: `name`, `dtype`, `trainable`.

    Input shape:
        `(N, H, W, C)`, or `(N, C, H, W)` with `data_format="channels_first"`. Floating point.

    Output shape:
        Same as the input shape.

    Raises:
        ValueError: If an argument is invalid or does not fit the input. The message names it.
        RuntimeError: If `implementation="native"` and the fused kernels do not support the call.

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
        """Validates and stores the arguments. `build` creates the weights."""
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        check_not_quantized(self)
        self._quantization: Mapping[str, Any] = {}  # of the inner layers; set by `from_config`
        self.reduction = standardize_positive(reduction, "reduction")
        self.kernel_size = standardize_pair(kernel_size, "kernel_size")
        self.dilation_rate = standardize_pair(dilation_rate, "dilation_rate")
        self.offset_groups = standardize_count(offset_groups, "offset_groups")
        self.modulated = standardize_flag(modulated, "modulated")
        self.deformable = standardize_choice(deformable, "deformable", ("separable", "dense"))
        self.norm = standardize_choice(norm, "norm", ("image", "channels"))
        self.identity_init = standardize_flag(identity_init, "identity_init")
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
        self.supports_masking = True  # outputs have the pixels of the input, so masks pass through

    def build(self, input_shape: Shape) -> None:
        """Creates the layers of the gate for inputs of this shape."""
        channel_axis = 3 if self.data_format == "channels_last" else 1
        channels = input_shape[channel_axis]
        if channels is None:
            raise ValueError(
                f"`input_shape` must have a known number of channels. Received: input_shape={input_shape}"
            )
        width = max(1, round(self.reduction * channels))
        if width % self.offset_groups:
            raise ValueError(
                f"`offset_groups` must divide the gate's channels, round({self.reduction} * {channels}) = "
                f"{width}. Received: offset_groups={self.offset_groups}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={channel_axis: channels})
        if channels == 1 and self.norm == "channels":
            warnings.warn(
                f"The gate '{self.name}' multiplies all pixels by the same number, because its feature map "
                'has one channel and `norm="channels"` normalizes over channels. Use `norm="image"`.',
                stacklevel=2,
            )
        self._create_layers(channels, width)
        last = input_shape if channel_axis == 3 else (*input_shape[:1], *input_shape[2:], channels)
        shape = tuple(last)
        for layer in self._gate_layers():
            build_layer(layer, shape, self._quantization)
            shape = layer.compute_output_shape(shape)

    def _create_layers(self, channels: int, width: int) -> None:
        """Creates the layers. Their order is that of the weights in saved files."""
        separable = self.deformable == "separable"
        # Before the norm, sums of large features exceed the range of float16.
        wide = "float32" if self.compute_dtype == "float16" else self.dtype_policy
        self.depthwise = self._depthwise(wide)
        self.reduce = self._pointwise(width, "reduce", wide)
        self.instance_norm = keras.layers.GroupNormalization(
            groups=-1, axis=-1, epsilon=folded_norm.EPSILON, name="instance_norm", dtype=wide
        )
        filters, groups = (width, width) if separable else (channels, 1)
        self.deform = self._deformable(filters, groups, use_bias=not separable)
        self.expand = self._pointwise(channels, "expand", self.dtype_policy) if separable else None
        self.layer_norm = self._layer_norm()

    def _depthwise(self, dtype: Any) -> DepthwiseConv2D:
        layer = DepthwiseConv2D(
            self.kernel_size,
            padding="same",
            use_bias=False,
            depthwise_initializer=_clone_initializer(self.kernel_initializer),
            depthwise_regularizer=self.kernel_regularizer,
            depthwise_constraint=self.kernel_constraint,
            name="depthwise",
            data_format="channels_last",
            dtype=dtype,
        )
        layer.supports_masking = True  # avoids a warning about masks, which this layer passes on
        return layer

    def _pointwise(self, channels: int, name: str, dtype: Any) -> keras.layers.Dense:
        """A pointwise convolution, as a `Dense` layer on the channels.

        The norm that follows makes a bias redundant.
        """
        return keras.layers.Dense(
            channels,
            use_bias=False,
            kernel_initializer=_clone_initializer(self.kernel_initializer),
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
            name=name,
            dtype=dtype,
        )

    def _deformable(self, filters: int, groups: int, use_bias: bool) -> DeformableConv2D:
        return DeformableConv2D(
            filters,
            self.kernel_size,
            padding="same",
            dilation_rate=self.dilation_rate,
            groups=groups,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            offset_scale=self.offset_scale,
            use_bias=use_bias,
            kernel_initializer=_clone_initializer(self.kernel_initializer),
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
            offset_initializer=_clone_initializer(self.offset_initializer),
            offset_regularizer=self.offset_regularizer,
            offset_constraint=self.offset_constraint,
            implementation=self.implementation,
            name="deform",
            data_format="channels_last",
            dtype=self.dtype_policy,
        )

    def _layer_norm(self) -> keras.layers.Layer:
        """The layer with the weights of the norm, which `folded_norm` computes."""
        norm, axes = keras.layers.LayerNormalization, {"axis": -1}
        if self.norm == "image":
            norm, axes = keras.layers.GroupNormalization, {"axis": -1, "groups": 1}
        return norm(
            epsilon=folded_norm.EPSILON,
            gamma_initializer="zeros" if self.identity_init else "ones",
            name="layer_norm",
            dtype=self.dtype_policy,
            **axes,
        )

    def _gate_layers(self) -> list[keras.layers.Layer]:
        """The layers between input and sigmoid, in the order of equations 1 to 3."""
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
        """Computes the attention map A of equation 3.

        Args:
            inputs: Tensor of the layer's input shape.

        Returns:
            Tensor of the input's shape, with values in (0, 1), or in (0, 2) with `identity_init`.

        Raises:
            ValueError: If `inputs` is symbolic. To output the map in a functional model, call `gate` in the
                `call` of a layer that has the gate as an attribute.
        """
        check_not_symbolic(inputs, "gate")
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
        x = self.depthwise(x)
        if pointwise.traces_convolutions() and self.reduce.quantization_mode is None:
            x = self._reduced_by_convolution(x)
        else:
            x = self.instance_norm(self.reduce(x))
        return _gelu(x)

    def _reduced_by_convolution(self, x: Tensor) -> Tensor:
        """`instance_norm(reduce(x))` for exports: no operation requires channels last."""
        norm = self.instance_norm
        x, kernel, scale, shift = (
            ops.cast(value, self.reduce.compute_dtype)
            for value in (x, self.reduce.kernel, norm.gamma, norm.beta)
        )
        x = pointwise.product(x, kernel)
        x = x - ops.mean(x, axis=(1, 2), keepdims=True)
        variance = ops.mean(ops.square(x), axis=(1, 2), keepdims=True)
        return x * (ops.rsqrt(variance + norm.epsilon) * scale) + shift

    def _expand_and_normalize(self, x: Tensor) -> Tensor:
        """The pointwise convolution from C' to C, if there is one, and the norm."""
        dtype = keras.backend.result_type(x.dtype, "float32")
        scale, shift = (ops.cast(weight, dtype) for weight in (self.layer_norm.gamma, self.layer_norm.beta))
        if self.identity_init:
            scale, shift = scale * self.identity_gain, shift * self.identity_gain
        if self.expand is None or self.expand.quantization_mode is not None:
            x = ops.cast(x if self.expand is None else self.expand(x), dtype)
            return folded_norm.normalize(x, scale, shift, self.norm, self.compute_dtype)
        kernel = ops.cast(self.expand.kernel, dtype)
        return folded_norm.normalized_product(x, kernel, scale, shift, self.norm, self.compute_dtype)

    def _channels_last(self, inputs: Tensor) -> Tensor:
        x = ops.cast(inputs, self.compute_dtype)
        return ops.transpose(x, (0, 2, 3, 1)) if self.data_format == "channels_first" else x

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Validates the input, which may be symbolic, and calls the layer."""
        check_input(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Multiplies the feature map by its gate."""
        gate = self.gate(inputs)
        return ops.cast(inputs, gate.dtype) * gate  # they differ with `autocast=False`

    def predict_offsets(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts where the gate samples the feature map; see `DeformableConv2D.predict_offsets`.

        Args:
            inputs: Tensor of the layer's input shape.

        Returns:
            `(offsets, mask)`, channels last. The offsets have shape `(N, H, W, offset_groups * taps * 2)`, in
            pixels of the feature map, `dy` before `dx`. The mask has shape `(N, H, W, offset_groups * taps)`,
            or is `None` if the layer is not modulated.

        Raises:
            ValueError: If `inputs` is symbolic.
        """
        check_not_symbolic(inputs, "predict_offsets")
        if not self.built:
            self.build(tuple(inputs.shape))
        return self.deform.predict_offsets(self._deformable_input(self._channels_last(inputs)))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input shape."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the serialized arguments of the constructor."""
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
        """Creates a layer from a configuration of this or an earlier version, quantized as saved."""
        config = {**_FORMER_DEFAULTS, **config}
        quantization = config.pop("quantization", {})
        layer = super().from_config(config)
        layer._quantization = quantization
        return layer


def _gelu(x: Tensor) -> Tensor:
    """The exact GELU; in TensorFlow's exports by `erf`, because tf2onnx cannot convert `Erfc`."""
    if keras.backend.backend() == "tensorflow" and must_be_portable((x,)):
        return 0.5 * x * (1 + ops.erf(x * math.sqrt(0.5)))
    return ops.gelu(x, approximate=False)


def _clone_initializer(initializer: Any) -> Any:
    """A copy for one weight: a Keras initializer that is used twice returns the same values twice."""
    return initializer.clone() if isinstance(initializer, initializers.Initializer) else initializer
