"""Precisions that a format does not support: layers compute in float32, or the error explains the problem."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_das._keras_internals import flatten_layers, replace_policy, with_variable_dtype
from keras_das.exporters import saved_model


@contextlib.contextmanager
def in_float32(model: keras.Model, dtypes: Collection[str]) -> Iterator[None]:
    """Context manager: layers that compute in one of `dtypes` compute in float32.

    Args:
        model: Keras model. Its weights keep their dtypes.
        dtypes: Collection of names of dtypes, for example `"bfloat16"`.
    """
    layers = [layer for layer in flatten_layers(model) if layer.compute_dtype in dtypes]
    policies = [layer.dtype_policy for layer in layers]
    try:
        for layer in layers:
            replace_policy(layer, _float32_policy(layer))
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            replace_policy(layer, policy)


def _float32_policy(layer: keras.Layer) -> Any:
    """Returns a float32 policy that keeps the variable dtype; variables are cast when they are read."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    float32 = keras.DTypePolicy("float32")
    if policy.quantization_mode is not None:
        float32 = type(policy).from_config({**policy.get_config(), "source_name": "float32"})
    return with_variable_dtype(float32, policy.variable_dtype)


def advice(folder: Path, lacking: Sequence[str]) -> str:
    """Returns a sentence for the error message of a failed conversion.

    Args:
        folder: Path of the SavedModel that was converted.
        lacking: Sequence of names of dtypes that the format does not support.

    Returns:
        The sentence, or `""` if the model uses none of these dtypes.
    """
    if not (found := [dtype for dtype in lacking if dtype in _dtypes(folder)]):
        return ""
    return (
        f" The model computes in {', '.join(found)}, for which the format lacks operations. Export a model "
        'with the dtype policy "float32", and quantize the exported model if necessary.'
    )


def _dtypes(folder: Path) -> set[str]:
    """Returns the dtypes of all operations in a SavedModel."""
    import tensorflow as tf

    values = [value for node in saved_model.nodes(saved_model.read(folder)) for value in node.attr.values()]
    types = {value.type for value in values} | {type for value in values for type in value.list.type}
    return {tf.dtypes.as_dtype(type).name for type in types - {0}}
