"""Models and their functional graphs: traversal, shapes and execution."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_das._keras_internals import Node, Tensor, node_of
from keras_das._requirements import check_keras_3


def check_built(model: keras.Model) -> None:
    """Raises a ValueError for anything except a built Keras 3 model."""
    check_keras_3("model", model)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a Keras model that has been built. Received: model={model!r}")


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


def data_format_of(tensor: Tensor) -> str:
    """Returns the data format of the nearest preceding layer that has one, also inside nested models."""
    return _nearest_data_format(tensor) or keras.config.image_data_format()


def _nearest_data_format(tensor: Tensor) -> str | None:
    nodes = [node_of(tensor)]
    seen = set(nodes)
    for node in nodes:
        operation = node.operation
        nested = isinstance(operation, keras.Function | keras.Sequential)
        inside = _nearest_data_format(operation.outputs[0]) if nested else None
        if data_format := inside or getattr(operation, "data_format", None):
            return data_format
        parents = [parent for parent in dict.fromkeys(node.parent_nodes) if parent not in seen]
        seen.update(parents)
        nodes.extend(parents)
    return None


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
