"""`freeze_trunk`: freezes a trained network, so that only its gates and its head are trained."""

from typing import Any

import keras

from keras_das._keras_internals import flatten_layers
from keras_das.layers import DASLayer
from keras_das.layers.arguments import standardize_flag
from keras_das.models.graph import sort_nodes


def freeze_trunk(model: keras.Model, freeze: bool = True) -> None:
    """Freezes the layers that the gates of a model depend on, so that only gates and head are trained.

    A layer belongs to the trunk if the input of a gate depends on it. Gates stay trainable, and so do the
    layers after the last gate, such as the head of a classifier or the feature pyramid of a detector. If a
    custom layer contains a gate and no later gate depends on it, all of its layers stay trainable, because
    the order of calls inside it is not known. Frozen batch normalization runs in inference mode, so its
    statistics do not change either.

    Call this function before `model.compile`.

    Args:
        model: Keras model. A functional or sequential model with gates, or a model that contains one, such as
            a KerasHub or KerasCV classifier or detector with a gated backbone.
        freeze: Boolean. Whether to freeze the trunk; `False` makes it trainable again. Defaults to `True`.

    Raises:
        ValueError: If the model has no gates in a graph of layers, if none of its gates is trainable, or if a
            sequential model with gates is not built.

    Example:

    >>> model = keras_das.attach_das(keras.applications.MobileNetV2())
    >>> keras_das.freeze_trunk(model)
    >>> model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    >>> model.fit(images, labels)
    >>> keras_das.freeze_trunk(model, False)
    >>> model.compile(keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")
    """
    freeze = standardize_flag(freeze, "freeze")
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: model={model!r}")
    outputs = [tensor for layer in flatten_layers(model) for tensor in _outputs(layer)]
    nodes = [node for node in sort_nodes(outputs) if _gates_in(node.operation)]
    if not nodes:
        raise ValueError(
            "`model` must have gates in a graph of layers; see `keras_das.attach_das`. "
            f"Received: model={model} of class {type(model).__name__}"
        )
    if freeze and not any(gate.trainable for gate in _gates_in(model)):
        raise ValueError(
            "`model` must have trainable gates. Set `model.trainable = True` first, which makes all of its "
            f"layers trainable. Received: model={model} with gates of trainable=False"
        )
    for node in sort_nodes(tensor for gated in nodes for tensor in gated.input_tensors):
        if isinstance(node.operation, keras.Layer):
            for layer in _without_gates(node.operation):
                layer.trainable = not freeze


def _outputs(layer: keras.Layer) -> list[Any]:
    """Returns the symbolic outputs of a functional or sequential model, and nothing for other layers."""
    if isinstance(layer, keras.Sequential) and not layer.built:
        if not _gates_in(layer):
            return []
        raise ValueError(
            f"Build the sequential model '{layer.name}' first, for example with a `keras.Input` as its first "
            "layer: its graph of layers does not exist yet."
        )
    return list(layer.outputs) if isinstance(layer, keras.Function | keras.Sequential) else []


def _gates_in(operation: Any) -> list[DASLayer]:
    """Returns the gates in an operation, which can be a gate itself."""
    layers = flatten_layers(operation) if isinstance(operation, keras.Layer) else []
    return [layer for layer in layers if isinstance(layer, DASLayer)]


def _without_gates(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layer and those inside it, except gates, their parts, and what contains gates."""
    parts = {id(part) for gate in _gates_in(layer) for part in flatten_layers(gate)}
    return [each for each in flatten_layers(layer) if id(each) not in parts and not _gates_in(each)]
