"""One sample of a model's inputs: its arrays, and the image among them that a layer depends on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_das._keras_internals import flatten_layers, node_of
from keras_das.models.graph import run, sort_nodes


class Sample(NamedTuple):
    """The inputs of a model, without the batch axis."""

    model: keras.Model
    arrays: list[np.ndarray]  # one per input of the model
    image: int  # index of the image that the layers depend on

    @property
    def pixels(self) -> np.ndarray:
        """The image, in the data format of the model."""
        return self.arrays[self.image]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the model's inputs for a batch of this sample."""
        return [(1, *array.shape) for array in self.arrays]

    def run(self) -> Any:
        """Returns the model's outputs for a batch of this sample."""
        batch = [array[None] for array in self.arrays]
        if len(batch) == 1:
            return run(self.model, batch[0])
        return self.model(keras.tree.pack_sequence_as(self.model.input, batch), training=False)


def sample_of(model: keras.Model, image: Any, layers: Sequence[Any]) -> Sample:
    """Reads the argument `image`, and finds the image that the layers depend on.

    Args:
        model: Built Keras model.
        image: Array: the image, for a model with one input. For several inputs, a list in their order, or a
            dict with their names or with the keys of the model's input.
        layers: Sequence of layers of the model, including those of nested models and layers.

    Raises:
        ValueError: If `image` does not fit the model, or if the layers depend on several images or on none.
    """
    if not _has_several_inputs(model):
        return Sample(model, [_image_array(image)], 0)
    arrays = [
        _unbatched(array, tensor) for array, tensor in zip(_flatten(model, image), model.inputs, strict=True)
    ]
    return Sample(model, arrays, _index_of_image(model, layers))


def _has_several_inputs(model: keras.Model) -> bool:
    return isinstance(model, keras.Function) and len(model.inputs) > 1


def _to_array(value: Any) -> np.ndarray:
    return ops.convert_to_numpy(value) if hasattr(value, "dtype") else np.asarray(value)


def _image_array(image: Any) -> np.ndarray:
    if isinstance(image, Mapping):
        raise ValueError(
            f"`image` must be an array for a model with one input. Received: a dict {list(image)}"
        )
    try:
        pixels = _to_array(image)
    except ValueError as error:
        raise ValueError(
            "`image` must be an array for a model with one input. "
            f"Received: a {type(image).__name__} ({error})"
        ) from error
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim != 3:
        raise ValueError(
            "`image` must have the shape (H, W, C) or (C, H, W), or be a batch of one. "
            f"Received: image.shape={pixels.shape}"
        )
    return pixels


def _flatten(model: keras.Model, image: Any) -> list[Any]:
    """Returns the values for the model's inputs, in order."""
    names = [tensor.name for tensor in model.inputs]
    if isinstance(image, Mapping):
        if isinstance(model.input, Mapping) and set(image) == set(model.input):
            return keras.tree.flatten({key: image[key] for key in model.input})
        if set(image) == set(names):
            return [image[name] for name in names]
    elif isinstance(image, list | tuple) and len(image) == len(names):
        return list(image)
    what = f"the keys {list(image)}" if isinstance(image, Mapping) else f"a {type(image).__name__}"
    raise ValueError(
        f"`image` must be a list or dict with an array for each of the inputs {names}. Received: {what}"
        + (f" of {len(image)}" if isinstance(image, list | tuple) else "")
    )


def _unbatched(value: Any, tensor: Any) -> np.ndarray:
    """Returns the value without its batch axis, validated against an input of the model."""
    array = _to_array(value)
    shape = tuple(tensor.shape[1:])
    if array.ndim == len(shape) + 1 and len(array) == 1:
        array = array[0]
    if array.ndim != len(shape) or any(
        known not in (None, size) for known, size in zip(shape, array.shape, strict=True)
    ):
        raise ValueError(
            f"`image` must have the shape {shape}, or be a batch of one, for the input '{tensor.name}'. "
            f"Received: the shape {array.shape}"
        )
    return array


def _index_of_image(model: keras.Model, layers: Sequence[Any]) -> int:
    """Returns the index of the image that the layers depend on, or of the only image input."""
    images = [i for i, tensor in enumerate(model.inputs) if len(tensor.shape) == 4]
    if len(images) > 1:
        holders = [
            node
            for node in sort_nodes(model.outputs)
            if any(_holds(node.operation, layer) for layer in layers)
        ]
        before = set(sort_nodes(tensor for node in holders for tensor in node.outputs))
        images = [i for i in images if node_of(model.inputs[i]) in before]
    if len(images) != 1:
        names = [model.inputs[i].name for i in images]
        raise ValueError(
            f"`layer` must depend on exactly one image input. Received: {[layer.name for layer in layers]}, "
            f"which depends on {names}"
        )
    return images[0]


def _holds(operation: Any, layer: Any) -> bool:
    inside = flatten_layers(operation) if isinstance(operation, keras.layers.Layer) else [operation]
    return any(other is layer for other in inside)
