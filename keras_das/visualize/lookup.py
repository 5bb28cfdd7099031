"""Layers of a model by name or class, and the format and size of its images."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_das._keras_internals import layers_inside
from keras_das.layers import DASLayer
from keras_das.models.graph import check_built

Tensor = Any


def layers_of_kind(model: keras.Model, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the layers of these classes, including those of nested models but not the parts of gates."""
    check_built(model)
    layers = layers_inside(model)
    for of in (model, *layers):
        if isinstance(of, keras.Model) and hasattr(of.call, "python_function"):
            raise ValueError(
                f"The `call` of model {of.name!r} is a `tf.function`, in which layers cannot be observed. "
                "Remove the decorator: Keras compiles `fit` and `predict` itself."
            )
    parts = {id(part) for layer in layers if isinstance(layer, DASLayer) for part in layers_inside(layer)}
    return [layer for layer in layers if isinstance(layer, kinds) and id(layer) not in parts]


def unique_names(layers: Sequence[Any]) -> list[str]:
    """Returns the names of layers, numbered if several nested models have layers of the same name."""
    taken = {layer.name for layer in layers}
    names: list[str] = []
    for layer in layers:
        name = layer.name
        if name in names:
            numbered = (f"{name}_{number}" for number in itertools.count(1))
            name = next(each for each in numbered if each not in taken)
            taken.add(name)
        names.append(name)
    return names


def as_layers(layers: Any) -> list[Any]:
    """Returns the argument `layers` as a list: one layer or name, or several different ones."""
    listed = [layers] if isinstance(layers, str | keras.Operation) else list(layers)
    if not listed or any(layer in listed[:number] for number, layer in enumerate(listed)):
        raise ValueError(
            f"`layers` must be a layer or name, or a sequence of different ones. Received: layers={layers!r}"
        )
    return listed


def find_layer(model: keras.Model, layer: str | keras.layers.Layer, kinds: tuple[type, ...]) -> Any:
    """Returns the layer of one of these classes that is given itself or by name, or raises a ValueError."""
    known = layers_of_kind(model, kinds)
    found = [of for of in known if of is layer or of.name == layer]
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(kind.__name__ for kind in kinds)
    names = [of.name for of in known]
    problem = f"{len(found)} have this name" if found else f"the model has {names}"
    raise ValueError(
        f"`layer` must be a {wanted} of the model, or its name. Received: layer={layer!r}; {problem}"
    )


def image_format(model: keras.Model) -> str:
    """Returns the data format of the model's images: that of its first layer that has one."""
    for layer in layers_inside(model):
        if data_format := getattr(layer, "data_format", None):
            return data_format
    return keras.config.image_data_format()


def image_size(shape: Sequence[int], data_format: str) -> tuple[int, int]:
    """Returns rows and columns of an image of this shape, which has no batch axis."""
    return (shape[0], shape[1]) if data_format == "channels_last" else (shape[1], shape[2])


def to_numpy(x: Tensor) -> np.ndarray:
    """Returns a tensor of any floating dtype as a float32 array."""
    return ops.convert_to_numpy(ops.cast(x, "float32"))
