"""`sampling_points`: the positions in an image that gates and deformable convolutions sample."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_das._keras_internals import layers_inside
from keras_das.layers import DASLayer, DeformableConv2D
from keras_das.models.graph import check_built
from keras_das.visualize.capture import inputs_of
from keras_das.visualize.fields import Fields, fields_of, through, windows_of
from keras_das.visualize.lookup import as_layers, find_layer, image_format, image_size, to_numpy
from keras_das.visualize.samples import Sample, sample_of

Tensor = Any
Point = tuple[float, float]

SAMPLING_LAYERS = (DASLayer, DeformableConv2D)


class SamplingPoints(NamedTuple):
    """The positions that a layer samples for one output position, and the factor of each sample."""

    points: np.ndarray  # (offset_groups, taps, 2): (y, x) in pixels of the image, taps in row-major order
    mask: np.ndarray  # (offset_groups, taps): factor of each sample; 1 without modulation
    inside: np.ndarray  # (offset_groups, taps): False for samples outside the feature map, which are 0
    position: tuple[int, int]  # row and column of the output position in its feature map
    center: np.ndarray  # (2,): (y, x) of the center of the output position, in pixels of the image


def sampling_points(
    model: keras.Model, image: Any, layer: str | keras.layers.Layer, point: Sequence[float]
) -> SamplingPoints:
    """Locates the samples of a gate or deformable convolution for one output position.

    The layer samples its input by bilinear interpolation. Each point is the center of the receptive field of
    a sample, in the image.

    Args:
        model: Keras model of images with a graph of layers: functional, sequential, or a subclass that
            contains such a network and passes the image to it unchanged.
        image: Array. The input of the model, without a batch axis or as a batch of one: `(H, W, C)`, or `(C,
            H, W)` for channels-first models. For a functional model with several inputs, a list of arrays in
            the order of the inputs, or a dict that maps input names to arrays. The layer must depend on
            exactly one image input.
        layer: `DASLayer` or `DeformableConv2D` of the model or of a nested model, or its name.
        point: `(y, x)` in pixels of the image. Selects the output position with the nearest center.

    Returns:
        `SamplingPoints`.

    Raises:
        ValueError: If an argument is invalid. The message names it.

    Example:

    >>> found = keras_das.visualize.sampling_points(model, image, "das_p4", (100, 60))
    >>> found.points[0, 4]  # (y, x) of the middle tap of 3x3, in the first offset group

    Reference:
        - [Dai et al., 2017](https://arxiv.org/abs/1703.06211), figure 6
    """
    sample, (found,) = read_layers(model, image, [layer])
    return found.at(check_point(model, sample.pixels, point))


def stacked_sampling_points(
    model: keras.Model, image: Any, layers: Sequence[str | keras.layers.Layer], point: Sequence[float]
) -> SamplingPoints:
    """Locates the samples of several consecutive layers for one output position of the last.

    Each point that the last layer samples selects the nearest output position of the preceding layer, and the
    points of that position are located in turn. Two gates of 3x3 taps yield 9x9 points. Masks are multiplied
    along the way. If a sample is outside its feature map, all points derived from it have `inside=False`.

    Args:
        model: Keras model; see `sampling_points`.
        image: Array, list or dict; see `sampling_points`.
        layers: Sequence of layers or their names, as in `sampling_points`, in any order. They are sorted by
            their order of execution and must be on one path.
        point: `(y, x)` in pixels of the image; see `sampling_points`.

    Returns:
        `SamplingPoints` with all points in one group. `position` and `center` are those of the last layer.

    Raises:
        ValueError: If an argument is invalid. The message names it.

    Example:

    >>> found = keras_das.visualize.stacked_sampling_points(model, image, ["das_p3", "das_p4"], (100, 60))
    >>> found.points.shape
    (1, 81, 2)
    """
    sample, (*earlier, last) = read_layers(model, image, as_layers(layers))
    found = last.at(check_point(model, sample.pixels, point))
    points, mask, inside = (x.reshape(-1, *x.shape[2:]) for x in (found.points, found.mask, found.inside))
    for reading in reversed(earlier):
        nested = [reading.at(at) for at in points]
        mask = (mask[:, None] * np.stack([of.mask.ravel() for of in nested])).ravel()
        inside = (inside[:, None] & np.stack([of.inside.ravel() for of in nested])).ravel()
        points = np.concatenate([of.points.reshape(-1, 2) for of in nested])
    return found._replace(points=points[None], mask=mask[None], inside=inside[None])


@dataclasses.dataclass(frozen=True)
class Reading:
    """One layer in one run of the model, with its input."""

    layer: Any
    inputs: Tensor
    fields: Fields

    @functools.cached_property
    def predicted(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The offsets and masks of all output positions."""
        offsets, mask = self.layer.predict_offsets(self.inputs)
        return to_numpy(offsets)[0], None if mask is None else to_numpy(mask)[0]

    def at(self, point: Sequence[float]) -> SamplingPoints:
        """Returns the sampling points of the output position nearest to a point in the image."""
        offsets, mask = self.predicted
        windows = windows_of(self.layer)
        grid = through(self.fields.inputs, windows)
        row, column = (axis.nearest(value) for axis, value in zip(grid, point, strict=True))
        taps = np.moveaxis(np.indices([window.kernel for window in windows]), 0, -1).reshape(-1, 2)
        first = [
            index * window.stride - window.pad_before(axis.size)
            for index, window, axis in zip((row, column), windows, self.fields.inputs, strict=True)
        ]
        moved = offsets[row, column].reshape(-1, len(taps), 2)  # dy before dx
        at = np.array(first) + taps * [window.dilation for window in windows] + moved
        sizes = np.array([axis.size for axis in self.fields.inputs])
        located = [axis.locate(at[..., i]) for i, axis in enumerate(self.fields.inputs)]
        return SamplingPoints(
            np.stack(located, axis=-1),
            np.ones(at.shape[:2]) if mask is None else mask[row, column].reshape(at.shape[:2]),
            np.all((at > -1) & (at < sizes), axis=-1),
            (row, column),
            np.array([axis.locate(index) for axis, index in zip(grid, (row, column), strict=True)]),
        )


def read_layers(
    model: keras.Model,
    image: Any,
    layers: Sequence[str | keras.layers.Layer],
    kinds: tuple[type, ...] = SAMPLING_LAYERS,
) -> tuple[Sample, list[Reading]]:
    """Runs the model on one image. Returns the readings of the layers in the order of execution."""
    check_built(model)
    found = [find_layer(model, layer, kinds) for layer in layers]
    sample = sample_of(model, image, found)
    order: list[Any] = []
    inputs = inputs_of(sample.run, found, order)
    fields = fields_in(sample, found)
    readings = {id(of): Reading(of, x, field) for of, x, field in zip(found, inputs, fields, strict=True)}
    return sample, [readings[id(of)] for of in order]


def fields_in(sample: Sample, layers: Sequence[Any]) -> list[Fields]:
    """Returns the positions of the inputs and outputs of the layers."""
    model = sample.model
    data_format = image_format(model)
    size = image_size(sample.pixels.shape, data_format)
    several: dict[str, Any] = (
        {} if len(sample.arrays) == 1 else {"shapes": sample.shapes, "image": sample.image}
    )
    found: dict[int, Fields] = {}
    for network in _networks(model):
        found = {**fields_of(network, size, data_format, **several), **found}  # the outermost wins
        if all(id(layer) in found for layer in layers):
            return [found[id(layer)] for layer in layers]
    missing = [layer.name for layer in layers if id(layer) not in found]
    raise ValueError(
        "`layer` must belong to a functional or sequential network that processes the image, because its "
        f"positions cannot be mapped to the image otherwise. Received: {missing}"
    )


def _networks(model: keras.Model) -> list[keras.Model]:
    """Returns the model if it is a graph of layers, otherwise its inner graphs of images, outermost first."""
    graphs = keras.Sequential | keras.Function
    if isinstance(model, graphs):
        return [model]
    inside = layers_inside(model)
    built = [layer for layer in inside if isinstance(layer, graphs) and layer.built]
    return [layer for layer in built if [len(tensor.shape) for tensor in layer.inputs] == [4]]


def check_point(model: keras.Model, image: np.ndarray, point: Sequence[float]) -> Point:
    """Returns the argument `point` if it lies on the image, or raises a ValueError."""
    size = image_size(image.shape, image_format(model))
    values = np.asarray(point, "float64")
    if values.shape != (2,) or not all(-0.5 <= at <= end - 0.5 for at, end in zip(values, size, strict=True)):
        raise ValueError(
            f"`point` must be (y, x) in pixels of the image, from -0.5 to {size[0] - 0.5} and "
            f"{size[1] - 0.5}. Received: point={point!r}"
        )
    return float(values[0]), float(values[1])
