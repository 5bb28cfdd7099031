"""Other attention modules, each from its paper, to compare `keras_das.DASLayer` with. Channels last."""

import math
from typing import Any

import keras
from keras import ops

Tensor = Any

_MIN_UNITS = 4
"""So that the hidden layer of SE and CBAM is one in narrow networks too, where C / 16 is 1."""


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class SE(keras.layers.Layer):
    """Squeeze-and-excitation: Hu et al., arXiv 1709.01507, equations 2 to 4."""

    def __init__(self, reduction: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduction = reduction

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[-1]
        self.squeeze = keras.layers.Dense(_units(channels, self.reduction), "relu", name="squeeze")
        self.excite = keras.layers.Dense(channels, "sigmoid", name="excite")
        self.squeeze.build((None, channels))
        self.excite.build((None, self.squeeze.units))

    def call(self, inputs: Tensor) -> Tensor:
        scale = self.excite(self.squeeze(ops.mean(inputs, axis=(1, 2))))
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
        self.output_layer = keras.layers.Dense(channels, name="output")
        self.spatial = keras.layers.Conv2D(1, 7, padding="same", activation="sigmoid", name="spatial")
        self.hidden.build((None, channels))
        self.output_layer.build((None, self.hidden.units))
        self.spatial.build((*input_shape[:3], 2))

    def call(self, inputs: Tensor) -> Tensor:
        pooled = (ops.mean(inputs, axis=(1, 2)), ops.max(inputs, axis=(1, 2)))
        channel = ops.sigmoid(sum(self.output_layer(self.hidden(x)) for x in pooled))
        x = inputs * channel[:, None, None]
        return x * self.spatial(_z_pool(x, axis=3))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "reduction": self.reduction}


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class ECA(keras.layers.Layer):
    """Efficient channel attention: Wang et al., arXiv 1910.03151, equations 9 and 12 (gamma 2, b 1)."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        size = int(abs(math.log2(input_shape[-1]) / 2 + 1 / 2))
        self.neighbours = keras.layers.Conv1D(
            1, size if size % 2 else size + 1, padding="same", use_bias=False, name="neighbours"
        )
        self.neighbours.build((None, input_shape[-1], 1))

    def call(self, inputs: Tensor) -> Tensor:
        scale = ops.sigmoid(self.neighbours(ops.mean(inputs, axis=(1, 2))[..., None]))[..., 0]
        return inputs * scale[:, None, None]


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class Triplet(keras.layers.Layer):
    """Triplet attention: Misra et al., arXiv 2010.03045, equation 4: the mean of three rotated gates."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.branches = {}
        for axis in (1, 2, 3):
            shape = [size for i, size in enumerate(input_shape) if i != axis]
            gate = keras.Sequential(
                [
                    keras.layers.Conv2D(1, 7, padding="same", use_bias=False, name="convolution"),
                    keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="norm"),
                    keras.layers.Activation("sigmoid", name="gate"),
                ],
                name=f"over_axis_{axis}",
            )
            gate.build((*shape, 2))
            setattr(self, f"over_axis_{axis}", gate)
            self.branches[axis] = gate

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        gates = []
        for axis, branch in self.branches.items():
            gate = branch(_z_pool(inputs, axis), training=training)[..., 0]
            gates.append(ops.expand_dims(gate, axis))
        return inputs * (gates[0] + gates[1] + gates[2]) / 3


def _z_pool(x: Tensor, axis: int) -> Tensor:
    """Mean and maximum over an axis, as the two channels of what is left."""
    return ops.stack([ops.mean(x, axis=axis), ops.max(x, axis=axis)], axis=-1)


def _units(channels: int, reduction: int) -> int:
    return max(_MIN_UNITS, channels // reduction)


LAYERS = {"se": SE, "cbam": CBAM, "eca": ECA, "triplet": Triplet}
