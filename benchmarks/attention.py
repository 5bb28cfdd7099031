"""Other attention modules from their papers, for comparison with `keras_das.DASLayer`. Channels last.

Their gates are `2 * sigmoid` of layers that start at 0, so they start at exactly 1, like DAS with
`identity_init`.
"""

from typing import Any

import keras
from keras import ops

Tensor = Any

_MIN_UNITS = 4
"""The smallest hidden layer of SE and CBAM, for narrow networks, where C / 16 is 1."""


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class SE(keras.layers.Layer):
    """Squeeze-and-excitation: Hu et al., arXiv 1709.01507, equations 2 to 4."""

    def __init__(self, reduction: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduction = reduction

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[-1]
        self.squeeze = keras.layers.Dense(_units(channels, self.reduction), "relu", name="squeeze")
        self.excite = keras.layers.Dense(channels, kernel_initializer="zeros", name="excite")
        self.squeeze.build((None, channels))
        self.excite.build((None, self.squeeze.units))

    def call(self, inputs: Tensor) -> Tensor:
        scale = _gate(self.excite(self.squeeze(ops.mean(inputs, axis=(1, 2)))))
        return inputs * scale[:, None, None]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "reduction": self.reduction}


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class CBAM(keras.layers.Layer):
    """Channel, then spatial attention: Woo et al., arXiv 1807.06521, equations 1 to 3."""

    def __init__(self, reduction: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduction = reduction

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[-1]
        self.hidden = keras.layers.Dense(_units(channels, self.reduction), "relu", name="hidden")
        self.output_layer = keras.layers.Dense(channels, kernel_initializer="zeros", name="output")
        self.spatial = keras.layers.Conv2D(1, 7, padding="same", kernel_initializer="zeros", name="spatial")
        self.hidden.build((None, channels))
        self.output_layer.build((None, self.hidden.units))
        self.spatial.build((*input_shape[:3], 2))

    def call(self, inputs: Tensor) -> Tensor:
        pooled = (ops.mean(inputs, axis=(1, 2)), ops.max(inputs, axis=(1, 2)))
        channel = _gate(sum(self.output_layer(self.hidden(x)) for x in pooled))
        x = inputs * channel[:, None, None]
        return x * _gate(self.spatial(ops.stack([ops.mean(x, axis=3), ops.max(x, axis=3)], axis=-1)))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "reduction": self.reduction}


def _gate(logits: Tensor) -> Tensor:
    return 2 * ops.sigmoid(logits)


def _units(channels: int, reduction: int) -> int:
    return max(_MIN_UNITS, channels // reduction)
