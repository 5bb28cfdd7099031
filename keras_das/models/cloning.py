"""Copies of functional models with their weights, with gates inserted after some of their layers."""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_das._keras_internals import Tensor, flatten_layers, lambda_arguments, node_of
from keras_das.layers import DASLayer


def clone_with_gates(model: keras.Model, gates: Mapping[str, DASLayer]) -> keras.Model:
    """Copies a functional model with its weights, and inserts gates after some of its layers.

    Args:
        model: Functional model, which is not changed.
        gates: Dict from the name of a layer to the gate that follows it.

    Returns:
        A functional model that shares nothing with `model`.
    """
    clones: dict[int, Any] = {}

    def clone(layer: Any) -> Any:
        if id(layer) not in clones:
            clones[id(layer)] = _clone_layer(layer, clone)
        return clones[id(layer)]

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        return gates[layer.name](outputs) if layer.name in gates else outputs

    inputs = keras.tree.map_structure(_clone_input, model.input)
    copy = keras.models.clone_model(model, inputs, clone_function=clone, call_function=call)
    for layer in model.layers:
        if id(layer) in clones:  # all except the inputs
            _copy_state(layer, clones[id(layer)])
    return copy


def _clone_input(tensor: Tensor) -> Tensor:
    return keras.layers.InputLayer.from_config(node_of(tensor).operation.get_config()).output


def _clone_layer(layer: Any, clone: Callable[[Any], Any]) -> Any:
    """Returns a copy of a layer with its own weights."""
    if isinstance(layer, keras.Model) and is_plain(layer):
        return keras.models.clone_model(layer, clone_function=clone)
    config = layer.get_config()
    if isinstance(layer, keras.layers.Lambda):
        return type(layer)(**{**config, **lambda_arguments(layer)})
    try:
        copy = type(layer).from_config(config)
    except Exception as error:
        raise ValueError(
            f"Layer '{layer.name}' cannot be copied: from_config(get_config()) of its class "
            f"{type(layer).__name__} fails. {_advice(type(layer))}"
        ) from error
    if copy.name != layer.name:  # the configuration of an operation does not include its name
        copy.name = layer.name
    return copy


def _advice(layer_class: type) -> str:
    """Advice for a layer that cannot be serialized."""
    library = layer_class.__module__.partition(".")[0]
    if library not in ("keras", "keras_hub", "keras_cv"):
        return "Let `get_config` return all arguments of the constructor."
    return (
        f"{library} cannot serialize this class, so gates can only follow the output of the model: "
        "keras.Model(model.inputs, keras_das.DASLayer()(model.output))."
    )


def is_plain(model: keras.Model) -> bool:
    """Whether the model is only a graph of layers, that is, its class is defined by Keras."""
    is_graph = isinstance(model, keras.Sequential | keras.Function)
    return is_graph and type(model).__module__.partition(".")[0] == "keras"


def _copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies weights, assets and trainable flags, including those of inner layers."""
    for old, new in zip(flatten_layers(source), flatten_layers(target), strict=True):
        # As from a file, because some layers derive state from loaded weights (`Normalization`).
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        if store:
            # Copied to NumPy, because training can reuse the memory of a model's weights.
            new.load_own_variables(
                {key: value.numpy() if hasattr(value, "numpy") else value for key, value in store.items()}
            )
        if hasattr(old, "save_assets"):  # for example the vocabulary of a `StringLookup`
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)
        new.trainable = old.trainable  # outer layers come first, so the flags of inner layers take precedence
    _copy_flags_of_weights(source, target)


def _copy_flags_of_weights(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies the trainable flags of individual weights.

    Weights are paired by name, because a layer that is built quantized has them in a different order.
    """
    if len(source.weights) != len(target.weights):
        raise ValueError(
            f"The layer '{source.name}' cannot be copied: it has {len(source.weights)} weights, and the "
            f"layer made from its configuration {len(target.weights)}. Merge weights that were added later, "
            "such as those of `enable_lora`, by saving and loading the model."
        )
    pairs = [sorted(layer.weights, key=lambda weight: weight.name) for layer in (source, target)]
    for old, new in zip(*pairs, strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable
