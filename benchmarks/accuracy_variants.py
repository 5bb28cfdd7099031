"""The variants that accuracy.py compares: DAS in several forms, other attention, controls."""

from collections.abc import Callable
from typing import Any

import keras
import keras_das
from keras import ops
from keras_das._keras_internals import node_of
from keras_das.models.cloning import clone_with_gates
from keras_das.models.graph import sort_nodes

import attention
from accuracy_tasks import Trunk

Tensor = Any
Attach = Callable[[Trunk], keras.Model]


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class Added(keras_das.DASLayer):
    """Control: the gate's layers, added to the feature map instead of multiplied with it."""

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + self._logits(inputs)


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class Pooled(keras_das.DASLayer):
    """DAS with a term of the channel means, which the instance norm removes: a hidden layer, as in SE."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        channels = input_shape[-1]
        self.squeeze = keras.layers.Dense(max(4, channels // 16), "relu", name="squeeze")
        self.excite = keras.layers.Dense(channels, kernel_initializer="zeros", name="excite")
        self.squeeze.build((None, channels))
        self.excite.build((None, self.squeeze.units))

    def _logits(self, x: Tensor) -> Tensor:
        pooled = self.excite(self.squeeze(ops.mean(x, axis=(1, 2))))
        return super()._logits(x) + pooled[:, None, None]


class _Bounded(keras_das.DeformableConv2D):
    """Offsets limited to two pixels by a tanh."""

    def _predict(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        offsets, mask = super()._predict(inputs)
        return 2 * ops.tanh(offsets / 2), mask


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class Bounded(keras_das.DASLayer):
    """DAS with bounded offsets."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        self.deform.__class__ = _Bounded


def _das(**arguments: Any) -> Attach:
    """`attach_das` with identity initialization."""
    return lambda trunk: keras_das.attach_das(trunk.model, trunk.stages, **arguments)


def _das_before_sums(**arguments: Any) -> Attach:
    """`attach_das` before the residual sum of each stage, as squeeze-and-excitation is usually placed."""
    return lambda trunk: keras_das.attach_das(
        trunk.model, [_before_sum(trunk.model.get_layer(stage).output) for stage in trunk.stages], **arguments
    )


def _before_sum(tensor: Tensor) -> str:
    """The last layer of the residual branch that ends in `tensor`, or the layer of `tensor` without one."""
    node = node_of(tensor)
    while len(node.parent_nodes) == 1 and node.parent_nodes[0].outputs[0].shape == tensor.shape:
        (node,) = node.parent_nodes
    if len(node.parent_nodes) < 2:
        return node_of(tensor).operation.name
    branch = max(node.parent_nodes, key=lambda parent: len(sort_nodes(parent.outputs)))
    return branch.operation.name


def _layers(layer: Callable[..., keras.layers.Layer], **arguments: Any) -> Attach:
    """Other layers at the same positions."""

    def attach(trunk: Trunk) -> keras.Model:
        made = {stage: layer(**arguments, name=f"at_{stage}") for stage in trunk.stages}
        return clone_with_gates(trunk.model, made)

    return attach


_SLOW = 0.1  # a tenth of the learning rate under Adam
_FORMER = {"norm": "channels", "identity_gain": 1.0, "dilation_rate": 1, "offset_scale": 1.0}
_NEAR = {"dilation_rate": 1, "offset_scale": 1.0}
_FAR = {"dilation_rate": 2, "offset_scale": _SLOW}
VARIANTS: dict[str, Attach] = {
    "none": lambda trunk: trunk.model,
    "SE": _layers(attention.SE),
    "CBAM": _layers(attention.CBAM),
    "the same layers, added": _layers(Added, identity_init=True, **_FAR),
    "DAS, offsets frozen at 0": _das(dilation_rate=2, offset_scale=0),
    "DAS": _das(**_FAR),
    "DAS, dilation 1, offsets frozen at 0": _das(dilation_rate=1, offset_scale=0),
    "DAS, dilation 1, offset scale 1": _das(**_NEAR),
    "DAS, norm over channels, paper's gate": _das(**{**_FORMER, "identity_init": False}),
    "DAS, norm over channels, gain 1": _das(**_FORMER),
    "DAS, paper's gate": _das(**_FAR, identity_init=False),
    "DAS, gain 1": _das(**_FAR, identity_gain=1.0),
    "DAS, gain 2": _das(**_FAR, identity_gain=2.0),
    "DAS, gain 8": _das(**_FAR, identity_gain=8.0),
    "the same layers, added, dense": _layers(Added, identity_init=True, **_FAR, deformable="dense"),
    "DAS, dense, offsets frozen at 0": _das(dilation_rate=2, offset_scale=0, deformable="dense"),
    "DAS, dense": _das(**_FAR, deformable="dense"),
    "DAS, offset scale 0.3": _das(dilation_rate=2, offset_scale=0.3),
    "DAS, alpha 0.1": _das(**_FAR, reduction=0.1),
    "DAS, alpha 0.5": _das(**_FAR, reduction=0.5),
    "DAS with a pooled term": _layers(Pooled, identity_init=True, **_FAR),
    "DAS, before the residual sums": _das_before_sums(**_FAR),
    "DAS, bounded offsets": _layers(Bounded, identity_init=True, dilation_rate=2, offset_scale=1.0),
}
