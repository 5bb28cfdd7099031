"""`freeze_trunk`: freezes a trained network, so that only its gates and its head are trained."""

from typing import Any

import keras

from keras_das._keras_internals import flatten_layers
from keras_das.layers import DASLayer
from keras_das.models.graph import sort_nodes


def freeze_trunk(model: keras.Model, freeze: bool = True) -> None:
    """Freezes the layers that the gates of a model depend on, so that only gates and head are trained.

    A layer belongs to the trunk if the input of a gate depends on it. Gates stay trainable, and so do the
    layers after the last gate, such as the head of a classifier or the feature pyramid of a detector. Frozen
    batch normalization runs in inference mode, so its statistics do not change either.

    Call this function before `model.compile`.

    Args:
        model: Keras model. A functional or sequential model with gates, or a model that contains one, such as
            a KerasHub or KerasCV classifier or detector with a gated backbone.
        freeze: Boolean. Whether to freeze the trunk; `False` makes it trainable again. Defaults to `True`.

    Raises:
        ValueError: If the model has no gates in a graph of layers.

    Example:

    >>> model = keras_das.attach_das(keras.applications.MobileNetV2())
    >>> keras_das.freeze_trunk(model)
    >>> model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    >>> model.fit(images, labels)
    >>> keras_das.freeze_trunk(model, False)
    >>> model.compile(keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: model={model!r}")
    graphs = [layer for layer in flatten_layers(model) if isinstance(layer, keras.Function)]
    nodes = [node for graph in graphs for node in sort_nodes(graph.outputs) if _has_gates(node.operation)]
    if not nodes:
        raise ValueError(
            "`model` must have gates in a graph of layers; see `keras_das.attach_das`. "
            f"Received: model={model} of class {type(model).__name__}"
        )
    for node in sort_nodes(tensor for gated in nodes for tensor in gated.input_tensors):
        if isinstance(node.operation, keras.Layer) and not _has_gates(node.operation):
            for layer in flatten_layers(node.operation):
                layer.trainable = not freeze


def _has_gates(operation: Any) -> bool:
    """Whether a layer is a gate or a model that contains gates."""
    if isinstance(operation, DASLayer):
        return True
    is_model = isinstance(operation, keras.Model)
    return is_model and any(isinstance(layer, DASLayer) for layer in flatten_layers(operation))
