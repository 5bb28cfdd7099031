"""All uses of names that Keras does not make public, in one file for updates of Keras.

Each of these has no public counterpart in Keras 3.15. All other modules use public names of Keras only, apart
from subclassing.
"""

from typing import Any

import keras

Tensor = Any  # a `keras.KerasTensor`
Node = Any  # one call of a layer; see `keras.src.ops.node.Node`

# The modules of `model.export`. Keras has no hook for exports, so they are detected on the call stack.
EXPORT_MODULES = "keras.src.export."


def node_of(tensor: Tensor) -> Node:
    """Returns the call that created the tensor. Public names lead from layers to tensors, but not back."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def flatten_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layer and all layers inside it, outer layers first.

    `keras.Model.layers` contains neither the layers inside nested models nor those inside other layers.
    """
    return layer._flatten_layers()


def layers_inside(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns all layers inside the layer, outer layers first."""
    return layer._flatten_layers(include_self=False)


def lambda_arguments(layer: keras.layers.Lambda) -> dict[str, Any]:
    """Returns the functions of a `Lambda` as arguments of its constructor.

    A function in a configuration loses its closure when it is deserialized, or cannot be deserialized at all.
    """
    return {"function": layer.function, "output_shape": layer._output_shape, "mask": layer.mask}


def replace_policy(layer: keras.layers.Layer, policy: Any) -> None:
    """Replaces the dtype policy of a layer. The public setter changes a map of policies in place."""
    layer._dtype_policy = policy


def with_variable_dtype(policy: keras.DTypePolicy, dtype: str) -> keras.DTypePolicy:
    """Returns the policy, which from now on has variables of this dtype. Policies have no such argument."""
    policy._variable_dtype = dtype
    return policy
