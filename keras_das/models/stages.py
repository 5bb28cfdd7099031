"""Detection of the ends of a CNN's stages from its graph."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_das._keras_internals import Node, Tensor, flatten_layers, node_of
from keras_das.models.graph import data_format_of, shapes_of, sort_nodes

# Level n has 1/2**n of the image's rows and columns, as in P2 to P5 of a feature pyramid.
LEVELS = (2, 3, 4, 5)
_PROBE = 512  # rows and columns of the image assumed for models that accept any size
_ACTIVATIONS = {"Activation", "ReLU", "Relu", "LeakyReLU", "PReLU", "ELU", "Gelu", "Silu", "HardSilu"}
_PADDINGS = {"ZeroPadding2D", "Pad"}
_NOT_FEATURES = {*_PADDINGS, "Dropout", "SpatialDropout2D", "InputLayer"}


def find_stages(model: keras.Model) -> dict[str, Tensor]:
    """Finds the last feature map of each level from P2 (1/4 of the image's rows and columns) to P5 (1/32).

    The image is the input of the first layers with weights. Resizing, cropping or pooling before these layers
    is preprocessing, and its outputs are not feature maps.

    A stage ends with a feature map that everything deeper depends on. If there are several, the end is the
    last residual sum or concatenation, or the last activation after it. In inverted residual blocks, that is
    the activation of the next block's expansion, which has the resolution of the sum and more channels. The
    deepest stage ends with the last feature map of its level.

    Args:
        model: Functional model.

    Returns:
        The feature maps by level, shallow to deep. Levels that the model skips are missing. A warning is
        issued if the model has levels deeper than P5.

    Raises:
        ValueError: If the model has no level from P2 to P5, or a level without such a feature map.
    """
    image = _image_input(model)
    nodes = _nodes_after(image, model.outputs)
    dominators = _dominators(nodes)
    levels = _levels(model, image, nodes, *_preprocessing(nodes, dominators))
    present = [level for level in LEVELS if level in levels.values()]
    if not present:
        raise ValueError(
            f"Model '{model.name}' has no feature map of 1/4 to 1/32 of its input's rows and columns. "
            "Name the layers to gate in `at`"
            + _examples(nodes, levels, dominators, max(levels.values(), default=0))
        )
    _warn_of_deeper_stages(model, nodes, levels, dominators)
    trunk = _trunk_of_outputs(model, nodes, levels, dominators, present[-1])
    stages: dict[str, Tensor] = {}
    for level in reversed(present):
        _check_no_nested_stages(trunk, levels, level)
        end = _stage_end([node for node in trunk if levels.get(node) == level], deepest=not stages)
        if end is None:
            raise ValueError(
                f"No single layer of model '{model.name}' ends its level P{level} (1/{2**level} of the "
                "image's rows and columns): a skip connection bypasses each candidate. Name layers to gate "
                "in `at`" + _examples(nodes, levels, dominators, level)
            )
        stages[f"P{level}"] = end.outputs[0]
        trunk = _members(dominators[end], nodes)
    return dict(reversed(stages.items()))


def _image_input(model: keras.Model) -> Tensor:
    images = [tensor for tensor in model.inputs if len(tensor.shape) == 4]
    if len(images) != 1:
        raise ValueError(
            f"Model '{model.name}' must have exactly one image input, or its stages cannot be found. "
            f"Received: inputs of shapes {[tensor.shape for tensor in model.inputs]}. "
            + (_advice_to_gate_inside(model) or "Name the layers to gate in `at`.")
        )
    return images[0]


def _advice_to_gate_inside(model: keras.Model) -> str:
    """Advice for models whose images pass through a nested model, such as siamese networks."""
    names = [
        layer.name
        for layer in model.layers
        if isinstance(layer, keras.Sequential | keras.Function)
        and [len(tensor.shape) for tensor in layer.inputs] == [4]
        and layer.weights
    ]
    if not names:
        return ""
    return (
        f"Attach gates to the model inside it that sees the images, {' or '.join(map(repr, names))}: "
        f"attach_das(model.get_layer('{names[0]}')), and build the rest around the result."
    )


def _nodes_after(image: Tensor, outputs: Iterable[Tensor]) -> list[Node]:
    """Returns the calls that depend on the image, in topological order."""
    after = {node_of(image)}
    for node in sort_nodes(outputs):
        if not after.isdisjoint(node.parent_nodes):
            after.add(node)
    return [node for node in sort_nodes(outputs) if node in after]


def _preprocessing(nodes: Sequence[Node], dominators: dict[Node, int]) -> tuple[set[Node], list[Node]]:
    """Returns the calls before the first layers with weights, and those that the whole network depends on.

    The latter are among the former and exclude the paddings of the first convolution.
    """
    learned: set[Node] = set()
    first: list[Node] = []
    for node in nodes:
        if not learned.isdisjoint(node.parent_nodes):
            learned.add(node)
        elif _has_weights(node.operation):
            learned.add(node)
            first.append(node)
    if not first:  # without weights, all layers are the network
        return set(nodes[:1]), list(nodes[:1])
    shared = -1
    for node in first:
        shared &= dominators[node]
    seen = [node for node in _members(shared, nodes) if node not in learned]
    while len(seen) > 1 and type(seen[-1].operation).__name__ in _PADDINGS:
        seen.pop()
    return set(nodes) - learned, seen


def _has_weights(operation: Any) -> bool:
    """Whether a layer has weights other than the statistics of `Normalization` layers."""
    if not isinstance(operation, keras.layers.Layer):
        return False
    inside = flatten_layers(operation)
    statistics = [
        w for layer in inside if isinstance(layer, keras.layers.Normalization) for w in layer.weights
    ]
    return len(operation.weights) > len(statistics)


def _levels(
    model: keras.Model,
    image: Tensor,
    nodes: Sequence[Node],
    preprocessing: set[Node],
    seen: Sequence[Node],
) -> dict[Node, int]:
    """Returns the level of each call that outputs a feature map."""
    maps = [node for node in nodes if len(node.outputs) == 1 and len(node.outputs[0].shape) == 4]
    shapes = _shapes(model, image, [node.outputs[0] for node in maps])
    rows, columns = (1, 2) if data_format_of(maps[-1].outputs[0]) == "channels_last" else (2, 3)
    sizes = {node: (shape[rows], shape[columns]) for node, shape in zip(maps, shapes, strict=True)}
    image_rows = [sizes[node][0] for node in seen if node in sizes and sizes[node][0]][-1]
    # Maps of one pixel are pooled vectors, such as in squeeze-and-excitation.
    known = {node: size[0] for node, size in sizes.items() if size[0] and size != (1, 1)}
    return {
        node: round(math.log2(image_rows / size)) for node, size in known.items() if node not in preprocessing
    }


def _warn_of_deeper_stages(
    model: keras.Model, nodes: Sequence[Node], levels: Mapping[Node, int], dominators: Mapping[Node, int]
) -> None:
    """Warns of levels that are not gated, except pooled branches that rejoin the network."""
    trunks = 0
    for output in model.outputs:
        trunks |= dominators.get(node_of(output), 0)
    deeper = [node for node in _members(trunks, nodes) if levels.get(node, 0) > LEVELS[-1]]
    if deeper:
        warnings.warn(
            f"Model '{model.name}' has feature maps smaller than 1/{2 ** LEVELS[-1]} of the image, from "
            f"layer '{deeper[0].operation.name}' on. They are not gated unless `at` names their layers.",
            stacklevel=6,
        )


def _shapes(model: keras.Model, image: Tensor, tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    probe = [
        (1, *(_PROBE if size is None and tensor is image else size for size in tensor.shape[1:]))
        for tensor in model.inputs
    ]
    return shapes_of(model, tensors, probe)


def _dominators(nodes: Sequence[Node]) -> dict[Node, int]:
    """Returns, for each call, the calls on all paths from the image to it, as a bit mask."""
    dominators: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        shared = -1  # all bits
        for parent in node.parent_nodes:
            shared &= dominators.get(parent, -1)  # no path from the image
        dominators[node] = (shared if i else 0) | 1 << i
    return dominators


def _members(bits: int, nodes: Sequence[Node]) -> list[Node]:
    return [node for i, node in enumerate(nodes) if bits >> i & 1]


def _trunk_of_outputs(
    model: keras.Model,
    nodes: Sequence[Node],
    levels: dict[Node, int],
    dominators: dict[Node, int],
    level: int,
) -> list[Node]:
    """Returns the calls on all paths from the image to an output at or below the level."""
    deep: set[Node] = set()
    for node in nodes:
        if levels.get(node) == level or not deep.isdisjoint(node.parent_nodes):
            deep.add(node)
    bits = -1
    for output in model.outputs:
        if node_of(output) in deep:
            bits &= dominators[node_of(output)]
    return _members(bits, nodes)


def _stage_end(stage: Sequence[Node], deepest: bool) -> Node | None:
    """Returns the feature map to gate, given those of a level that everything deeper depends on, in order."""
    kinds = [type(node.operation).__name__ for node in stage]
    # A product does not merge branches; it applies a squeeze-and-excitation in the middle of a block.
    merges = [i for i, node in enumerate(stage) if len(set(node.parent_nodes)) > 1 and kinds[i] != "Multiply"]
    if merges and not deepest:
        end = merges[-1]
        return stage[max(i for i in range(end, len(stage)) if i == end or kinds[i] in _ACTIVATIONS)]
    features = _features(stage)
    return features[-1] if features else None


def _examples(
    nodes: Sequence[Node], levels: Mapping[Node, int], dominators: Mapping[Node, int], level: int
) -> str:
    """Returns the end of a sentence that suggests layers near the end of a level."""
    at_level = [node for node in nodes if levels.get(node) == level]
    if not at_level:
        return "."
    stage = [node for node in _members(dominators[at_level[-1]], nodes) if levels.get(node) == level]
    ends = [_stage_end(stage, deepest=False), *_features(stage)[-2:]]
    names = dict.fromkeys(node.operation.name for node in ends if node is not None)
    return f", for example one of {list(names)}." if names else "."


def _features(stage: Sequence[Node]) -> list[Node]:
    return [node for node in stage if type(node.operation).__name__ not in _NOT_FEATURES]


def _check_no_nested_stages(trunk: Sequence[Node], levels: dict[Node, int], level: int) -> None:
    for node in trunk:
        if isinstance(node.operation, keras.Model) and levels.get(node) == level:
            before = max(levels.get(parent, 0) for parent in node.parent_nodes)
            if any(before < hidden < level for hidden in LEVELS):
                name = node.operation.name
                raise ValueError(
                    f"The stages are inside the nested model '{name}'. Attach gates to it, "
                    f"attach_das(model.get_layer('{name}')), and build on the result; or gate only its "
                    f"output, at=['{name}']."
                )
