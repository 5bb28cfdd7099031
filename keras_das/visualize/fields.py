"""Positions of feature map pixels in the image, from receptive fields composed layer by layer.

Positions are pixel indices: an integer is the center of a pixel, so the first row of pixels of the image
extends from -0.5 to 0.5.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras

from keras_das._keras_internals import Node, Tensor
from keras_das.layers import DASLayer, DeformableConv2D
from keras_das.models.graph import shapes_of, sort_nodes
from keras_das.ops.geometry import Window, make_windows

_WINDOWS = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv2D,
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    DeformableConv2D,
)


class Axis(NamedTuple):
    """The rows or the columns of a feature map, and their receptive fields in the image."""

    size: int
    stride: float  # distance between neighbors, in pixels of the image
    low: float  # first pixel of the receptive field of index 0, which can be padding
    high: float  # last pixel of the same receptive field

    def locate(self, index: Any) -> Any:
        """Returns the center of the receptive field of `index`, in the image. `index` can be fractional."""
        return self.stride * index + (self.low + self.high) / 2

    def nearest(self, position: float) -> int:
        """Returns the index whose center is nearest to a position in the image."""
        index = (position - self.locate(0)) / self.stride
        return min(max(int(index + 0.5), 0), self.size - 1)  # int() rounds up only negatives, clipped to 0

    def through(self, window: Window) -> "Axis":
        """Returns the axis of the outputs of a window that slides over this axis."""
        before = window.pad_before(self.size)
        return Axis(
            window.output_size(self.size),
            self.stride * window.stride,
            self.low - before * self.stride,
            self.high + (window.extent - 1 - before) * self.stride,
        )

    def moved(self, before: int, size: int) -> "Axis":
        """Returns the axis with `before` pixels added at its start, or removed if negative."""
        return Axis(size, self.stride, self.low - before * self.stride, self.high - before * self.stride)

    def resized(self, size: int) -> "Axis":
        """Returns the axis after resizing, with the same two ends."""
        if size == self.size:
            return self
        ratio = self.size / size
        shift = (ratio - 1) / 2 * self.stride
        return Axis(size, self.stride * ratio, self.low + shift, self.high + shift)


Shape = tuple[int | None, ...]
Field = tuple[Axis, Axis]  # rows and columns


class Fields(NamedTuple):
    """The positions of the inputs and outputs of one layer."""

    inputs: Field
    outputs: Field


def windows_of(layer: Any) -> tuple[Window, Window]:
    """Returns the windows over rows and columns of a convolution, a pooling layer or a gate."""
    if isinstance(layer, DASLayer):
        layer = layer.deform
    size = getattr(layer, "kernel_size", None) or layer.pool_size
    return make_windows(size, layer.strides, getattr(layer, "dilation_rate", (1, 1)), layer.padding)


def through(field: Field, windows: tuple[Window, Window]) -> Field:
    """Returns the field of the outputs of windows that slide over a feature map."""
    rows, columns = (axis.through(window) for axis, window in zip(field, windows, strict=True))
    return rows, columns


def fields_of(
    model: keras.Model,
    size: tuple[int, int],
    data_format: str,
    shapes: Sequence[Shape] | None = None,
    image: int | None = None,
) -> dict[int, Fields]:
    """Locates the feature maps of a model, including nested models, in an image.

    The receptive field of a window (convolution, pooling) is the union of those of its taps. The same holds
    for the inputs of a sum, product or concatenation. Padding and cropping shift the feature map. A gate does
    not change it. All other operations that change the size of a feature map (resizing, upsampling, slicing)
    are assumed to keep its ends in place.

    Args:
        model: Functional or sequential model.
        size: `(rows, columns)` of the image.
        data_format: String. `"channels_last"` or `"channels_first"`, for all feature maps.
        shapes: Sequence of the shapes of the model's inputs, for a batch of one. Required if there are
            several inputs. Defaults to `None`.
        image: Integer. Index of the input that is the image. Defaults to `None`, which treats each 4-D input
            as an image of this size.

    Returns:
        The fields by the `id` of the layer, in the order of execution.
    """
    field = Axis(size[0], 1, 0, 0), Axis(size[1], 1, 0, 0)
    found: dict[int, Fields] = {}
    images = [
        field if len(tensor.shape) == 4 and image in (None, i) else None
        for i, tensor in enumerate(model.inputs)
    ]
    _follow(model, images, data_format, found, shapes)
    return found


def _follow(
    model: keras.Model,
    inputs: Sequence[Field | None],
    data_format: str,
    found: dict[int, Fields],
    shapes: Sequence[Shape] | None = None,
) -> list[Field | None]:
    """Returns the fields of the model's outputs and stores those of its layers in `found`."""
    nodes = sort_nodes(model.outputs)
    sizes = dict(_sizes(model, nodes, inputs, data_format, shapes))
    fields = {id(tensor): field for tensor, field in zip(model.inputs, inputs, strict=True)}
    for node in (node for node in nodes if not node.is_input):
        operation = node.operation
        sources = [fields.get(id(tensor)) for tensor in node.input_tensors]
        if isinstance(operation, keras.Sequential | keras.Function):
            outputs = _follow(operation, sources, data_format, found)
        else:
            ends = [sizes.get(id(tensor)) for tensor in node.outputs]
            outputs = [_after(operation, sources, size, data_format) for size in ends]
        fields.update({id(tensor): field for tensor, field in zip(node.outputs, outputs, strict=True)})
        known = [field for field in sources if field]
        if known and outputs and outputs[0]:
            found[id(operation)] = Fields(_union(known), outputs[0])
    return [fields.get(id(tensor)) for tensor in model.outputs]


def _sizes(
    model: keras.Model,
    nodes: Sequence[Node],
    inputs: Sequence[Field | None],
    data_format: str,
    known: Sequence[Shape] | None,
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields the `id` of each feature map with its rows and columns."""
    first = 1 if data_format == "channels_last" else 2
    shapes = []
    for i, (tensor, field) in enumerate(zip(model.inputs, inputs, strict=True)):
        shape = list(known[i]) if known else [1, *tensor.shape[1:]]
        if field:
            shape[first : first + 2] = [axis.size for axis in field]
        shapes.append(tuple(shape))
    maps: list[Tensor] = [tensor for node in nodes for tensor in node.outputs if len(tensor.shape) == 4]
    for tensor, found in zip(maps, shapes_of(model, maps, shapes), strict=True):
        yield id(tensor), (found[first], found[first + 1])


def _after(
    operation: Any, sources: Sequence[Field | None], size: tuple[int, int] | None, data_format: str
) -> Field | None:
    """Returns the field of an operation's output, which has this size if it is a feature map."""
    known = [field for field in sources if field]
    if size is None or not known:
        return None
    field = _union(known)
    if isinstance(operation, _WINDOWS):
        return through(field, windows_of(operation))
    before = _pixels_before(operation, field, data_format)
    if before is not None:
        return field[0].moved(before[0], size[0]), field[1].moved(before[1], size[1])
    return field[0].resized(size[0]), field[1].resized(size[1])


def _pixels_before(operation: Any, field: Field, data_format: str) -> tuple[int, int] | None:
    """Pixels that a padding or cropping adds before rows and columns; `None` for other operations."""
    if isinstance(operation, keras.layers.ZeroPadding2D):
        (top, _), (left, _) = operation.padding
        return top, left
    if isinstance(operation, keras.layers.Cropping2D):
        (top, _), (left, _) = operation.cropping
        return -top, -left
    if isinstance(operation, keras.layers.CenterCrop):
        above, left = field[0].size - operation.height, field[1].size - operation.width
        if above >= 0 and left >= 0:  # a smaller image is resized
            return -(above // 2), -(left // 2)
    if type(operation).__name__ == "Pad" and len(operation.pad_width) == 4:  # `keras.ops.pad` in a graph
        first = 1 if data_format == "channels_last" else 2
        return operation.pad_width[first][0], operation.pad_width[first + 1][0]
    return None


def _union(fields: Sequence[Field]) -> Field:
    """Returns the field of a sum of feature maps. Smaller maps, such as scales per channel, are ignored."""
    largest = max(fields, key=lambda field: field[0].size * field[1].size)
    same = [field for field in fields if all(a.size == b.size for a, b in zip(field, largest, strict=True))]
    rows, columns = (
        Axis(axes[0].size, axes[0].stride, min(axis.low for axis in axes), max(axis.high for axis in axes))
        for axes in zip(*same, strict=True)
    )
    return rows, columns
