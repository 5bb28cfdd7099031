"""Configurations of gated backbones: the graph of layers, its taps, and its dtype policies."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_das._keras_internals import Tensor
from keras_das.models.graph import view


def serialize_network(model: keras.Model, taps: Mapping[str, Tensor]) -> dict[str, Any]:
    """Serializes a gated backbone: its layers, their connections and its taps."""
    return keras.saving.serialize_keras_object(view(model, taps))


def deserialize_network(
    config: dict[str, Any],
    input_shape: Iterable[int | None],
    dtypes: tuple[keras.DTypePolicy, keras.DTypePolicy] | None = None,
) -> keras.Model:
    """Rebuilds the network that `serialize_network` has serialized.

    Args:
        config: Dict: the result of `serialize_network`.
        input_shape: Tuple. Shape of an image, which can differ from the serialized one.
        dtypes: Pair of a dtype policy and the policy that replaces it. Defaults to `None`, which keeps the
            policies.

    Returns:
        Functional model with the outputs `{"output": ..., "taps": {level: ...}}`.
    """
    if dtypes and not _same_policy(*dtypes):
        config = _with_dtype(config, *dtypes)
    layers = [
        _with_input_shape(layer, [None, *input_shape]) if layer["class_name"] == "InputLayer" else layer
        for layer in config["config"]["layers"]
    ]
    return keras.saving.deserialize_keras_object({**config, "config": {**config["config"], "layers": layers}})


def _with_input_shape(layer: dict[str, Any], shape: list[int | None]) -> dict[str, Any]:
    return {**layer, "config": {**layer["config"], "batch_shape": shape}}


def serialize_policy(policy: keras.DTypePolicy) -> dict[str, Any]:
    """Serializes a copy of a policy, because Keras changes the policies in a map when it serializes it."""
    return keras.dtype_policies.serialize(copy.deepcopy(policy))


def _same_policy(a: keras.DTypePolicy, b: keras.DTypePolicy) -> bool:
    """Whether two policies are equal; Keras cannot compare a map of policies with a policy."""
    return serialize_policy(a) == serialize_policy(b)


def _policy_name(policy: keras.DTypePolicy) -> str:
    """Returns the name of a policy; for a map of policies, the name of its default policy."""
    return getattr(policy, "default_policy", policy).name


def _with_dtype(config: Any, old: keras.DTypePolicy, new: keras.DTypePolicy) -> Any:
    """Returns the configuration with one policy replaced by another, also inside quantized policies.

    Maps of policies are replaced completely, because they are the policy of a backbone.
    """
    if isinstance(config, list | tuple):
        return [_with_dtype(value, old, new) for value in config]
    if not isinstance(config, dict):
        return config
    name, inner = _policy_name(old), config.get("config") or {}
    kind = config.get("class_name")
    if kind == "DTypePolicyMap" or (kind == "DTypePolicy" and inner["name"] == name):
        return serialize_policy(new)
    if isinstance(inner, dict) and inner.get("source_name") == name:
        return {**config, "config": {**inner, "source_name": _policy_name(new)}}
    return {key: _with_dtype(value, old, new) for key, value in config.items()}
