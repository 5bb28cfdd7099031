"""The precision of the layers inside a gate, which `quantize` changes, in configurations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

_ENTRIES = ("dtype", "quantization_config")  # of a layer's configuration


def quantization_of(layers: Iterable[keras.layers.Layer]) -> dict[str, Any]:
    """The serialized precision of the layers that are quantized, by their names."""
    configs = {layer.name: layer.get_config() for layer in layers if layer.quantization_mode is not None}
    return {
        name: {entry: config[entry] for entry in _ENTRIES if entry in config}
        for name, config in configs.items()
    }


def build_layer(
    layer: keras.layers.Layer, shape: Sequence[int | None], quantization: Mapping[str, Any]
) -> None:
    """Builds a layer in the precision that `quantization_of` wrote of it, if it did."""
    saved = quantization.get(layer.name)
    if saved is None:
        layer.build(shape)
        return
    policy = keras.dtype_policies.deserialize(saved["dtype"])
    config = keras.saving.deserialize_keras_object(saved.get("quantization_config"))
    if policy.quantization_mode == "float8":
        # It adds to the weights that the layer has, and they come first in the layer that was quantized.
        layer.build(shape)
        layer.dtype_policy = policy
        layer.quantization_config = config
    else:
        layer.dtype_policy = policy
        layer.quantization_config = config
        layer.build(shape)


def check_not_quantized(layer: keras.layers.Layer) -> None:
    """Raises a ValueError for a layer that cannot compute in its quantized precision."""
    if layer.quantization_mode is not None:
        raise ValueError(
            "`dtype` must not be quantized: build the model in a floating precision, then call "
            f"`model.quantize({layer.quantization_mode!r})`. Received: dtype={layer.dtype_policy.name!r}"
        )
