"""`attach_das`: copies a model and inserts attention gates after its stages."""

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import keras

from keras_das._keras_internals import Node, Tensor, node_of
from keras_das._requirements import check_keras_3
from keras_das.layers import DASLayer
from keras_das.models.cloning import clone_with_gates, is_plain
from keras_das.models.graph import data_format_of, sort_nodes, view
from keras_das.models.stages import LEVELS, find_stages

Site = str | Any  # a layer, or the name of a layer or level
_LIBRARIES = ("keras_hub", "keras_cv")
_LEVEL_NAMES = [f"P{level}" for level in LEVELS]
# The setting of the offsets that benchmarks/accuracy.py found ahead of fixed offsets.
_OFFSETS = {"dilation_rate": 2, "offset_scale": 0.1}


def attach_das(
    model: keras.Model,
    at: Site | Sequence[Site] | None = None,
    identity_init: bool = True,
    **das_arguments: Any,
) -> keras.Model:
    """Copies a convolutional network and inserts DAS gates after its stages.

    The copy has the weights of the model but shares none with it: training one does not change the other.
    With `identity_init`, the outputs of the copy are bit-identical to those of the model until the gates are
    trained. (Under XLA they can differ in the last bits, because XLA can fuse the layers next to a gate
    differently.)

    A KerasHub or KerasCV backbone becomes a backbone of the same library, whose feature pyramid consists of
    the gated feature maps. Build `ImageClassifier`, `RetinaNet` and similar models on it, and save and load
    it as a `.keras` file or a preset. A model of `keras.applications`, or any other functional or sequential
    model with or without a head, becomes a functional model.

    Layers keep their `trainable` flags, precision and data format. The gates are trainable; if the model is
    frozen, only they are trained. The copy is not compiled.

    Args:
        model: Keras model: a KerasHub or KerasCV backbone, or a functional or sequential `keras.Model`.
        at: Layer, string or a sequence of these. The feature maps to gate: a layer, the name of a layer, or a
            level (`"P2"` to `"P5"`). Defaults to `None`, which selects the end of each level from P2 to P5
            (1/4 to 1/32 of the rows and columns of the image). In a KerasHub or KerasCV backbone, the levels
            are its feature pyramid outputs. In other models, a level ends with the last feature map that all
            deeper layers depend on. If the level has residual sums or concatenations, it ends with the last
            of them, or with the last activation after it. The deepest level ends with its last feature map.
        identity_init: Boolean. Whether the gates start at exactly 1; see `keras_das.DASLayer`. Defaults to
            `True`.
        **das_arguments: Further arguments of `keras_das.DASLayer`, except `name`. Here, `dilation_rate`
            defaults to `2` and `offset_scale` to `0.1`. In `benchmarks/RESULTS.md`, gates with these values
            are more accurate than gates with fixed offsets on `clutter`, and as accurate on `grocery`.
            `data_format` defaults to that of the feature map, and `dtype` to the precision of the layer that
            the gate follows.

    Returns:
        The new model. Gates are named `das_p2` to `das_p5` for levels and `das_<layer>` for layers.

    Raises:
        ValueError: If the model is neither functional nor sequential nor a backbone, if `at` contains a name
            that is not a layer or level of the model, if a layer cannot be gated (it has several outputs, is
            called more than once, does not output a feature map, or is gated already), or if `at` is `None`
            and the stages cannot be detected.

    Example:

    >>> base = keras.applications.ResNet50()
    >>> model = keras_das.attach_das(base)
    >>> [layer.name for layer in model.layers if isinstance(layer, keras_das.DASLayer)]
    ['das_p2', 'das_p3', 'das_p4', 'das_p5']

    >>> backbone = keras_hub.models.Backbone.from_preset("resnet_50_imagenet")
    >>> classifier = keras_hub.models.ImageClassifier(keras_das.attach_das(backbone), num_classes=120)

    >>> model = keras_das.attach_das(base, at=["conv4_block6_out", "P5"], reduction=0.1)

    Reference:
        - [Salajegheh et al., 2023](https://arxiv.org/abs/2311.12091), section 3: one gate after each stage
    """
    check_keras_3("model", model)
    library = _library_of(model)
    taps = library.taps(model) if library else {}
    base = view(model, taps)
    try:
        sites = _sites(base, taps, at)
    except ValueError as error:
        if not (advice := _advice_for_encoders(model)):
            raise
        raise ValueError(f"{str(error).rstrip('.')}. {advice}") from error
    gates = {
        node_of(tensor).operation.name: _gate(name, tensor, identity_init, das_arguments)
        for name, tensor in sites.items()
    }
    network = clone_with_gates(base, gates)
    if library:
        return library.backbone_from(network, model)
    return keras.Model(network.input, network.output["output"], name=model.name)


def _library_of(model: keras.Model) -> ModuleType | None:
    """Returns the module for the library of a backbone, or `None` for other models."""
    for name in _LIBRARIES:
        library = sys.modules.get(name)  # if it is not imported, the model is not of its classes
        if library is None:
            continue
        if isinstance(model, library.models.Task):
            raise ValueError(
                "`model` must be a backbone, not a task: call attach_das(task.backbone) and build the task "
                f"on the result. Received: model={model} of class {type(model).__name__}"
            )
        if isinstance(model, library.models.Backbone):
            if len(model.inputs) != 1:
                raise ValueError(f"`model` must have one input. Received: inputs={model.inputs}")
            return importlib.import_module(f"keras_das.models.{name}")
    _check_graph(model)
    return None


def _check_graph(model: keras.Model) -> None:
    """Checks that the model consists only of a graph of layers."""
    if not isinstance(model, keras.Sequential | keras.Function) or not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a functional or sequential Keras model, or a backbone of KerasHub or KerasCV: "
            "gates are attached to a graph of layers, and a subclassed model has none. "
            f"Received: model={model} of class {type(model).__name__}"
        )
    if not is_plain(model):
        raise ValueError(
            f"`model` must be of a class that Keras defines: a copy would lose what {type(model).__name__} "
            "adds to its graph of layers. Pass keras.Model(model.inputs, model.outputs) to gate the graph "
            f"alone. Received: model={model}"
        )
    if isinstance(model, keras.Sequential) and not model.built:
        raise ValueError(
            f"Build the sequential model '{model.name}' first, for example with a `keras.Input` as its first "
            "layer: the shapes of its feature maps are not known yet."
        )


def _sites(
    base: keras.Model, taps: Mapping[str, Tensor], at: Site | Sequence[Site] | None
) -> dict[str, Tensor]:
    """Returns the feature maps to gate, by the names of their gates."""
    nodes = sort_nodes(base.outputs)
    layers = {node.operation.name: node.outputs[0] for node in nodes}
    if at is None:
        chosen = list(_default_levels(base, taps).items())
    else:
        single = isinstance(at, str | keras.Operation)
        if not single and not isinstance(at, Iterable):
            raise ValueError(f"`at` must contain layers, or names of layers or levels. Received: at={at!r}")
        names = [_name_of(base, nodes, site) for site in ([at] if single else at)]
        chosen = _named(base, layers, taps, names)
    sites: dict[str, Tensor] = {}
    for name, tensor in chosen:
        _check_site(name, tensor, nodes)
        if any(tensor is other for other in sites.values()):
            raise ValueError(
                f"`at` names the layer '{node_of(tensor).operation.name}' twice. Received: at={at}"
            )
        gate_name = f"das_{name}" if name in layers else f"das_{name.lower()}"
        if gate_name in layers:
            raise ValueError(
                f"Model '{base.name}' already has a layer '{gate_name}', which is the name of the new gate. "
                "Rename the layer."
            )
        if gate_name in sites:
            raise ValueError(
                f"`at` names two feature maps whose gates would both be '{gate_name}', a level and a layer "
                f"of its name. Name the layer that ends the level instead. Received: at={at}"
            )
        sites[gate_name] = tensor
    return sites


def _advice_for_encoders(model: keras.Model) -> str:
    """Advice for a backbone that contains another one, such as KerasHub's `RetinaNetBackbone`."""
    if not isinstance(getattr(model, "image_encoder", None), keras.Model):
        return ""
    return (
        "Attach gates to its image encoder, attach_das(backbone.image_encoder), and build the "
        f"{type(model).__name__} on the result."
    )


def _default_levels(base: keras.Model, taps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not taps:
        return find_stages(base)
    chosen = {level: taps[level] for level in _LEVEL_NAMES if level in taps}
    if not chosen:
        raise ValueError(
            f"Backbone '{base.name}' has none of the levels {_LEVEL_NAMES}. `at` must name the levels or "
            f"layers to gate. Levels of the backbone: {list(taps)}"
        )
    return chosen


def _named(
    base: keras.Model, layers: Mapping[str, Tensor], taps: Mapping[str, Tensor], names: Sequence[str]
) -> list[tuple[str, Tensor]]:
    """Looks up names of layers and levels."""
    if not names:
        raise ValueError("`at` must name a layer or a level. Received: at=[]")
    levels = taps
    if not taps and any(name in _LEVEL_NAMES and name not in layers for name in names):
        levels = find_stages(base)
    known = {**levels, **layers}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"Model '{base.name}' has no layer or level named {unknown}."
            + "".join(_hint(str(name), base, known) for name in unknown)
        )
    return [(name, known[name]) for name in names]


def _name_of(base: keras.Model, nodes: Sequence[Node], site: Site) -> str:
    """Returns the name of a site that is a layer; names are returned unchanged."""
    if not isinstance(site, keras.Operation):
        return site
    if not any(node.operation is site for node in nodes):
        raise ValueError(
            f"`at` must contain layers of the model '{base.name}'. Received: '{site.name}', a "
            f"{type(site).__name__} that is not one of its layers." + _hint(site.name, base, {})
        )
    return site.name


def _hint(name: str, base: keras.Model, known: Mapping[str, Tensor]) -> str:
    for layer in base.layers:
        if isinstance(layer, keras.Model) and name in {inner.name for inner in layer.layers}:
            return (
                f" '{name}' is inside the nested model '{layer.name}': attach gates to that, and build on "
                "the result."
            )
    close = difflib.get_close_matches(name, known, n=5)
    return f" Close to '{name}': {close}." if close else ""


def _check_site(name: str, tensor: Tensor, nodes: Sequence[Node]) -> None:
    """Checks that a gate can follow the feature map and does not do so already."""
    operation = node_of(tensor).operation
    calls = [node for node in nodes if node.operation is operation]
    gates = [node.operation for node in nodes if any(tensor is source for source in node.input_tensors)]
    gates = [gate for gate in [operation, *gates] if isinstance(gate, DASLayer)]
    if gates:
        problem = f"is gated already, by '{gates[0].name}'"
    elif len(calls) > 1:
        problem = "is called more than once, so that it is not clear which of its outputs to gate"
    elif len(calls[0].outputs) > 1:
        problem = "has several outputs"
    elif calls[0].is_input:
        problem = "is an input of the model"
    elif len(tensor.shape) != 4:
        problem = f"does not output a feature map: its output has the shape {tensor.shape}"
    else:
        return
    raise ValueError(f"Cannot gate '{name}': layer '{operation.name}' {problem}.")


def _gate(name: str, tensor: Tensor, identity_init: bool, das_arguments: Mapping[str, Any]) -> DASLayer:
    if "name" in das_arguments:
        raise ValueError(
            "`name` must be omitted, because each gate is named after the layer that it follows. "
            f"Received: name={das_arguments['name']!r}"
        )
    fitting = {
        "data_format": data_format_of(tensor),
        "dtype": _precision(tensor),
    }
    return DASLayer(**{**_OFFSETS, **fitting, **das_arguments}, identity_init=identity_init, name=name)


def _precision(tensor: Tensor) -> str:
    """Returns the dtype policy for a gate: that of the preceding layer, without quantization.

    If that does not fit the feature map, the policy is derived from its dtype. A gate has no quantized form
    of its own; only the layers inside it are quantized.
    """
    operation = node_of(tensor).operation
    if getattr(operation, "compute_dtype", None) != tensor.dtype:  # a plain `keras.Operation` has none
        return f"mixed_{tensor.dtype}" if tensor.dtype in ("float16", "bfloat16") else tensor.dtype
    mixed = operation.variable_dtype != tensor.dtype
    return f"mixed_{tensor.dtype}" if mixed else tensor.dtype
