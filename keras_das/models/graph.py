"""Functional graphs: execution, traversal, and copies with gates."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

from keras_das.layers import DASLayer

Tensor = Any  # a `keras.KerasTensor`
Node = Any  # one call of a layer; see `keras.src.ops.node.Node`


def node_of(tensor: Tensor) -> Node:
    """Returns the call that created the tensor."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def sort_nodes(tensors: Iterable[Tensor]) -> list[Node]:
    """Returns the calls that the tensors depend on, including their own, in topological order."""
    done: dict[Node, None] = {}
    # An explicit stack, because recursion exceeds Python's limit in very deep networks.
    stack = [(node_of(tensor), False) for tensor in tensors]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            done.setdefault(node)
        elif node not in done:
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parent_nodes)
    return list(done)


def names_before(tensor: Tensor) -> set[str]:
    """Returns the names of the layers that the tensor depends on, including its own."""
    return {node.operation.name for node in sort_nodes([tensor])}


def data_format_of(tensor: Tensor) -> str:
    """Returns the data format of the nearest preceding layer that has one."""
    nodes = [node_of(tensor)]
    seen = set(nodes)
    for node in nodes:
        if data_format := getattr(node.operation, "data_format", None):
            return data_format
        parents = [parent for parent in dict.fromkeys(node.parent_nodes) if parent not in seen]
        seen.update(parents)
        nodes.extend(parents)
    return keras.config.image_data_format()


def shapes_of(
    model: keras.Model, tensors: list[Tensor], input_shapes: list[tuple[int | None, ...]]
) -> list[tuple[Any, ...]]:
    """Returns the shapes of tensors of the model for inputs of these shapes."""
    if all(
        tuple(x.shape)[1:] == tuple(shape)[1:] for x, shape in zip(model.inputs, input_shapes, strict=True)
    ):
        return [tuple(tensor.shape) for tensor in tensors]
    return keras.Model(model.inputs, tensors).compute_output_shape(input_shapes)


def run(model: keras.Model, images: Any) -> Any:
    """Returns the model's outputs for a batch of images, passed in the structure of its only input."""
    if not isinstance(model, keras.Function):
        return model(images, training=False)
    if len(model.inputs) != 1:
        raise ValueError(f"`model` must have one input. Received: model.inputs={model.inputs}")
    return model(keras.tree.map_structure(lambda _: images, model.input), training=False)


def view(model: keras.Model, taps: Mapping[str, Tensor]) -> keras.Model:
    """Returns a model of the same layers with outputs `{"output": ..., "taps": {level: ...}}`.

    The outputs then include everything that a copy or a file must preserve, independently of layer names.
    """
    one_way = isinstance(model, keras.Sequential)
    inputs, outputs = (model.inputs[0], model.outputs[0]) if one_way else (model.input, model.output)
    return keras.Model(inputs, {"output": outputs, "taps": dict(taps)}, name=model.name)


def clone_with_gates(model: keras.Model, gates: Mapping[str, DASLayer]) -> keras.Model:
    """Copies a functional model with its weights, and inserts gates after some of its layers.

    Args:
        model: The functional model, which is not changed.
        gates: The gates, by the name of the layer that each follows.

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
        # A function loses its closure when it is deserialized, or cannot be deserialized at all.
        functions = {"function": layer.function, "output_shape": layer._output_shape, "mask": layer.mask}
        return type(layer)(**{**config, **functions})
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
        f"The class is {library}'s and does not serialize: gates can only be put on what the model returns, "
        "keras.Model(model.inputs, keras_das.DASLayer()(model.output))."
    )


def is_plain(model: keras.Model) -> bool:
    """Whether the model is only a graph of layers, that is, its class is defined by Keras."""
    is_graph = isinstance(model, keras.Sequential | keras.Function)
    return is_graph and type(model).__module__.partition(".")[0] == "keras"


def _copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Copies weights, assets and trainable flags, including those of inner layers."""
    for old, new in zip(source._flatten_layers(), target._flatten_layers(), strict=True):
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
    pairs = [sorted(layer.weights, key=lambda weight: weight.name) for layer in (source, target)]
    for old, new in zip(*pairs, strict=True):
        if new.trainable != old.trainable:
            new.trainable = old.trainable


def check_gates(
    gates: Mapping[str, DASLayer],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """Checks that every path through a gated layer passes through its gate.

    Args:
        gates: The gates, by the name of the layer that each follows.
        before: Outputs and taps of the model without gates.
        after: The same of the model with gates, as its library reads them.

    Raises:
        RuntimeError: If a gate is bypassed.
    """
    for name, tensor in before.items():
        layers_before, layers_after = names_before(tensor), names_before(after[name])
        expected = {gate.name for layer, gate in gates.items() if layer in layers_before}
        found = {gate.name for gate in gates.values() if gate.name in layers_after}
        if expected != found:
            raise RuntimeError(f"{name} should run through the gates {expected} but runs through {found}.")
    for node in sort_nodes(after.values()):
        for parent in node.parent_nodes:
            gate = gates.get(parent.operation.name)
            if gate is not None and node.operation is not gate:
                raise RuntimeError(f"'{node.operation.name}' bypasses the gate '{gate.name}'.")


def flatten_outputs(outputs: Any, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the outputs and taps of a model, named for messages."""
    flat = {f"output {i}": tensor for i, tensor in enumerate(keras.tree.flatten(outputs))}
    return {**flat, **{f"tap '{level}'": tensor for level, tensor in taps.items()}}


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
        config: The result of `serialize_network`.
        input_shape: Shape of an image, which can differ from the serialized one.
        dtypes: A dtype policy, and the policy that replaces it.

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
