"""The models that accuracy.py compares: other attention, variants of DAS, and what a trained gate does."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import keras_das
import numpy as np
from keras import ops
from keras_das.models.graph import clone_with_gates

import attention

Tensor = Any


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class ZeroFirstValues(keras.constraints.Constraint):
    """Holds the first `count` entries of a weight's last axis at zero: the offsets', before the masks'."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, weight: Tensor) -> Tensor:
        return weight * ops.cast(ops.arange(weight.shape[-1]) >= self.count, weight.dtype)


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class SpatialNormDAS(keras_das.DASLayer):
    """DAS whose layer norm is over space and channels, with a scale and a centre for each channel."""

    def _expand_and_normalize(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        mean, variance = ops.moments(x, axes=(1, 2, 3), keepdims=True)
        x = (x - mean) * ops.rsqrt(variance + self.layer_norm.epsilon)
        return x * self.layer_norm.gamma + self.layer_norm.beta


@keras.saving.register_keras_serializable("keras_das_benchmarks")
class GainedDAS(keras_das.DASLayer):
    """DAS with the layer norm's scale and centre counted four times: SGD moves the gate 16 times as fast."""

    def _expand_and_normalize(self, x: Tensor) -> Tensor:
        return 4 * super()._expand_and_normalize(x)


def register(classify: Any) -> None:
    """Adds the modules that accuracy.py compares to those of `examples/classify.py`."""
    for name, layer in attention.LAYERS.items():
        classify.ATTENTIONS[name] = _attach(layer)
    classify.ATTENTIONS["das_frozen"] = _attach_frozen(classify)
    classify.ATTENTIONS["das_blocks"] = _attach_to_blocks
    classify.ATTENTIONS["das_spatial_norm"] = _attach(SpatialNormDAS)
    classify.ATTENTIONS["das_gained"] = _attach(functools.partial(GainedDAS, identity_init=True))


def _attach(layer: Callable[..., keras.layers.Layer]) -> Any:
    """After the same layers that the gates of DAS follow."""

    def attach(backbone: Any, config: Any) -> keras.Model:
        return clone_with_gates(
            backbone.model, {stage: layer(name=f"at_{stage}") for stage in backbone.stages}
        )

    return attach


def _attach_frozen(classify: Any) -> Any:
    def attach(backbone: Any, config: Any) -> keras.Model:
        model = classify.attach_das(backbone, config)
        for gate in gates_of(model):
            count = gate.deform.offset_groups * gate.deform.taps * 2
            for weight in (gate.deform.offset_kernel, gate.deform.offset_bias):
                weight.constraint = ZeroFirstValues(count)
        return model

    return attach


def _attach_to_blocks(backbone: Any, config: Any) -> keras.Model:
    sums = [layer for layer in backbone.model.layers if isinstance(layer, keras.layers.Add)]
    after = [layer._outbound_nodes[0].operation.name for layer in sums]  # the activation after the sum
    return keras_das.attach_das(backbone.model, after, identity_init=config.identity_init == "on")


def gates_of(model: keras.Model) -> list[keras_das.DASLayer]:
    """The gates of a model, those of models inside it included."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras_das.DASLayer)]


def describe(path: pathlib.Path, config: Any) -> dict[str, Any]:
    """What a trained model costs, and what its gates do on 256 images of the test split."""
    from examples import data

    model = keras.models.load_model(path, compile=False)
    features = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    split = data.load(config.data, config.image_size, config.seed, share=config.data_share).splits["test"]
    chosen = split.images[np.random.default_rng(0).permutation(split.count)[:256]]
    inputs = keras_das.visualize.gate_inputs(model, chosen.astype("float32"))
    return {
        "multiply_adds": multiply_adds(features),
        "gates": [_describe_gate(gate, x) for gate, x in inputs],
    }


def _describe_gate(gate: keras_das.DASLayer, x: Tensor) -> dict[str, Any]:
    """How far the taps move, how many leave the map, and how the gate's values spread."""
    offsets, _ = gate.predict_offsets(x)
    offsets, values = np.asarray(offsets, "float64"), np.asarray(gate.gate(x), "float64")
    height, width = offsets.shape[1:3]
    size = gate.kernel_size
    moved = offsets.reshape(*offsets.shape[:3], gate.offset_groups, *size, 2)
    grid = np.stack(np.indices((height, width)), -1)[:, :, None, None, None]
    taps = np.stack(np.indices(size), -1) - (np.array(size) - 1) // 2
    at = grid + taps * np.array(gate.dilation_rate) + moved
    outside = ((at <= -1) | (at >= np.array([height, width]))).any(-1)
    top = 2 if gate.identity_init else 1
    return {
        "name": gate.name,
        "map": [height, width],
        "offset_rms_pixels": float(np.sqrt((moved**2).sum(-1).mean())),
        "taps_outside": float(outside.mean()),
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "saturated": float(((values < 0.05 * top) | (values > 0.95 * top)).mean()),
    }


def multiply_adds(model: keras.Model) -> int:
    """Of one image, counted from the layers' weights and outputs; pooling and products left out."""
    return sum(_multiply_adds(layer, layer.output.shape[1:-1]) for layer in model.layers if layer.weights)


def _multiply_adds(layer: keras.layers.Layer, size: tuple[int, ...]) -> int:
    pixels = int(np.prod(size))
    if isinstance(layer, keras_das.DeformableConv2D):
        sampled = layer.taps * layer.offset_kernel.shape[2] * 5  # four corners, and the mask
        return pixels * (int(np.prod(layer.kernel.shape)) + int(np.prod(layer.offset_kernel.shape)) + sampled)
    if isinstance(layer, attention.SE | attention.CBAM):
        dense = 2 * int(np.prod(layer._layers[0].kernel.shape))
        spatial = (
            pixels * int(np.prod(layer.spatial.kernel.shape)) if isinstance(layer, attention.CBAM) else 0
        )
        return dense * (2 if spatial else 1) + spatial
    if isinstance(layer, attention.ECA):
        return int(np.prod(layer.neighbours.kernel.shape)) * layer.output.shape[-1]
    if isinstance(layer, attention.Triplet):
        sides = (*size, layer.output.shape[-1])
        return sum(7 * 7 * 2 * int(np.prod(sides)) // side for side in sides)
    if isinstance(layer, keras_das.DASLayer):
        inner = layer._flatten_layers(include_self=False, recursive=False)
        return sum(_multiply_adds(part, size) for part in inner)
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense | keras.layers.DepthwiseConv2D):
        return pixels * int(np.prod(layer.kernel.shape))
    return 0
