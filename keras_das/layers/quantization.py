"""Configurations of the layers inside a gate that `quantize` has changed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

_ENTRIES = ("dtype", "quantization_config")  # of a layer's configuration


def quantization_of(layers: Iterable[keras.layers.Layer]) -> dict[str, Any]:
    """Returns the serialized precision of each quantized layer, by name."""
    configs = {layer.name: layer.get_config() for layer in layers if layer.quantization_mode is not None}
    return {
        name: {entry: config[entry] for entry in _ENTRIES if entry in config}
        for name, config in configs.items()
    }


def build_layer(
    layer: keras.layers.Layer, shape: Sequence[int | None], quantization: Mapping[str, Any]
) -> None:
    """Builds a layer in the precision that `quantization_of` has saved for it, if any."""
    saved = quantization.get(layer.name)
    if saved is None:
        layer.build(shape)
        return
    policy = keras.dtype_policies.deserialize(saved["dtype"])
    config = keras.saving.deserialize_keras_object(saved.get("quantization_config"))
    if policy.quantization_mode == "float8":
        # Float8 adds weights to a built layer; in the saved layer they follow the original weights.
        layer.build(shape)
        layer.dtype_policy = policy
        layer.quantization_config = config
    else:
        layer.dtype_policy = policy
        layer.quantization_config = config
        layer.build(shape)


def check_not_quantized(layer: keras.layers.Layer) -> None:
    """Raises a ValueError for a layer that is created with a quantized dtype policy."""
    if layer.quantization_mode is not None:
        raise ValueError(
            "`dtype` must not be quantized: build the model in a floating precision, then call "
            f"`model.quantize({layer.quantization_mode!r})`. Received: dtype={layer.dtype_policy.name!r}"
        )
