"""Views of a model: drawings by `keras_das.visualize`, and probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from examples import common
from examples.common import UserError
from examples.exploring import pictures
from keras_das import visualize

SIDE = 576
"""The smallest longer side of a drawing in pixels: more than its size on the page."""
OPEN_SIZE = 224
"""The side of images for models that accept any size."""
_DPI = 192  # of the points and crosses of `visualize`


@dataclasses.dataclass(frozen=True)
class Place:
    """A point of a picture relative to its height and width, independent of the image size of models."""

    y: float
    x: float


MIDDLE = Place(0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture on the page and its caption."""

    image: Image.Image
    caption: str


def clicked(index: Sequence[int], size: Sequence[int]) -> Place:
    """The place of a click at `index` on a drawing of `size`, both x before y as in Gradio.

    Gradio rounds clicks to the nearest edge between two pixels of the drawing.
    """
    (x, y), (width, height) = index, size
    return Place(y / height, x / width)


class View:
    """One model and its views on the page.

    Args:
        model: A functional or sequential model of images `(H, W, 3)` or `(H, W, 1)`.
        name: Name on the page.
        class_names: Names of its outputs; `None` numbers them.
        open_size: The side of images if the model accepts any size.
    """

    def __init__(
        self,
        model: keras.Model,
        name: str,
        class_names: Sequence[str] | None = None,
        open_size: int = OPEN_SIZE,
    ) -> None:
        """Runs the model once to find its gates."""
        self.model, self.name = model, name
        self.shape = _image_shape(model, name, open_size)
        found = visualize.gate_inputs(model, np.zeros((1, *self.shape), "float32"))
        self.gates = [gate for gate, _ in found]
        self.map_sizes = [
            tuple(x.shape[1:3] if gate.data_format == "channels_last" else x.shape[2:]) for gate, x in found
        ]
        self.class_names = _class_names(model, name, class_names)
        self.scale = math.ceil(SIDE / max(self.shape[:2]))

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Width and height of its drawings, a whole multiple of the image's."""
        return self.shape[1] * self.scale, self.shape[0] * self.scale

    def fit(self, picture: Image.Image) -> np.ndarray:
        """The picture at the model's size, uint8 `(H, W, 3)` or `(H, W)`, scaled and center-cropped."""
        height, width, channels = self.shape
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(fitted.convert("RGB" if channels == 3 else "L"))

    def _input(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.astype("float32").reshape(self.shape)

    def point(self, place: Place) -> tuple[float, float]:
        """`(y, x)` in pixels of the model's image, whose first pixel extends from -0.5 to 0.5."""
        return place.y * self.shape[0] - 0.5, place.x * self.shape[1] - 0.5

    def predict(self, picture: Image.Image) -> dict[str, float]:
        """The probabilities by class, with a softmax if the model has none."""
        images = self._input(self.fit(picture))[None]
        if not isinstance(self.model, keras.Sequential):  # may be a list or dictionary of one
            images = keras.tree.map_structure(lambda _, images=images: images, self.model.input)
        scores = keras.ops.cast(self.model(images, training=False), "float32")
        values = keras.ops.convert_to_numpy(scores)[0]
        if values.min() < 0 or abs(values.sum() - 1) > 1e-2:
            values = keras.ops.convert_to_numpy(keras.ops.softmax(scores))[0]
        return dict(zip(self.class_names, values.tolist(), strict=True))

    def stage(self, number: int) -> int:
        """The number of the gate to show, limited to the gates of this model."""
        return min(number, len(self.gates) - 1)

    def share(self, number: int) -> float:
        """The rows of a gate's feature map relative to those of the image."""
        return self.map_sizes[self.stage(number)][0] / self.shape[0]

    def points(self, picture: Image.Image, number: int, stacked: bool, place: Place) -> Drawing:
        """The positions that a gate samples for a place, with `stacked` through the previous gate."""
        number, pixels, point = self.stage(number), self.fit(picture), self.point(place)
        first = number - 1 if stacked and number else number
        layers = self.gates[first : number + 1]
        figure = visualize.plot_sampling_points(
            self.model, self._input(pixels), layers if len(layers) > 1 else layers[0], point, pixels
        )
        axes = figure.axes[0]
        caption = axes.get_title().replace("\n", ": ")
        if beyond := _count_beyond(axes):
            caption += f", {beyond} beyond the picture's edge"
        if stacked and not number:
            caption += "; no gate comes before it"
        return Drawing(self._draw(axes, point), caption)

    def plain(self, picture: Image.Image, place: Place) -> Drawing:
        """The picture and the place, for models without gates."""
        axes = Figure().subplots()
        axes.imshow(self.fit(picture), cmap="gray", vmin=0, vmax=255)
        return Drawing(self._draw(axes, self.point(place)), "no gates")

    def gate(self, picture: Image.Image, number: int) -> Drawing:
        """The share of its feature map that a gate keeps."""
        gate, pixels = self.gates[self.stage(number)], self.fit(picture)
        figure = visualize.plot_gates(self.model, [self._input(pixels)], [gate], pictures=[pixels])
        axes = figure.axes[1]
        name, values = axes.get_title().split("\n")
        return Drawing(self._draw(axes), f"{name}: {values} of the map's magnitude")

    def grad_cam(self, picture: Image.Image, number: int, share: float) -> Drawing:
        """The Grad-CAM of a feature map for the class with the highest score.

        The map is that of gate `number`. Without gates, it is the last one whose rows are closest to this
        `share` of the image's rows.
        """
        layer = self.gates[self.stage(number)] if self.gates else self._layer_of(share)
        scores, pixels = self.predict(picture), self.fit(picture)
        best = max(scores, key=lambda name: scores[name])
        models = {self.name: (self.model, layer)}
        figure = visualize.plot_grad_cam(models, self._input(pixels), picture=pixels)
        return Drawing(self._draw(figure.axes[1]), f"{layer.name}: for {best}")

    def _layer_of(self, share: float) -> keras.layers.Layer:
        layers = _feature_layers(self.model)
        known = [layer for layer in layers if layer.output.shape[1]]
        if not known:  # a model of images of any size
            return layers[-1]
        return min(reversed(known), key=lambda layer: abs(layer.output.shape[1] / self.shape[0] - share))

    def _draw(self, axes: Axes, point: tuple[float, float] | None = None) -> Image.Image:
        """One part of a figure, with a ring at `point`; a pixel of the image is `scale` pixels wide."""
        figure = axes.figure
        if point is not None:
            axes.plot(point[1], point[0], "o", color="white", fillstyle="none", markersize=10, clip_on=False)
        for other in [other for other in figure.axes if other is not axes]:
            other.remove()
        figure.set_layout_engine("none")
        axes.set_title("")
        axes.set_axis_off()
        axes.set_aspect("auto")
        axes.set_position((0, 0, 1, 1))
        figure.set_dpi(_DPI)
        # The canvas truncates fractions of a pixel, including rounding errors.
        figure.set_size_inches([(side + 0.1) / _DPI for side in self.drawn_size])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB")


def _count_beyond(axes: Axes) -> int:
    """The number of points outside the picture."""
    x, y = np.concatenate([points.get_offsets() for points in axes.collections]).T
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return int(np.sum((x < left) | (x > right) | (y < top) | (y > bottom)))


def _image_shape(model: keras.Model, name: str, open_size: int) -> tuple[int, int, int]:
    if not isinstance(model, keras.Function | keras.Sequential) or len(model.inputs) != 1:
        raise UserError(f"{name} must be a functional or sequential model with one input")
    shape = tuple(model.inputs[0].shape)
    if len(shape) != 4 or shape[3] not in (1, 3):
        raise UserError(
            f"{name} expects {shape}; images of shape (height, width, 3) or (height, width, 1) are required"
        )
    return shape[1] or open_size, shape[2] or open_size, shape[3]


def _class_names(model: keras.Model, name: str, given: Sequence[str] | None) -> list[str]:
    """The names of the classes; empty if the model does not output one score per class."""
    shapes = [tuple(tensor.shape) for tensor in model.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        return []
    count = shapes[0][1]
    if given is None:
        return [f"class {number}" for number in range(count)]
    if len(given) != count or len(set(given)) != count:
        raise UserError(f"{name} has {count} classes, and the labels are {', '.join(given)}: give --labels")
    return list(given)


def _feature_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that output feature maps, including those of nested models, in order of execution."""
    found: list[keras.layers.Layer] = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += _feature_layers(layer)
        elif not isinstance(layer, keras.layers.InputLayer) and len(getattr(layer.output, "shape", ())) == 4:
            found.append(layer)
    return found


def load_view(path: str | Path, labels: Sequence[str] | None = None, open_size: int = OPEN_SIZE) -> View:
    """The model of a `.keras` file, with class names from `labels` or the `results.json` next to it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path} (`make demo` trains runs/demo/model.keras)")
    try:
        model = keras.models.load_model(path, compile=False)
    # Any error of Keras, or of the libraries of the layers, for unreadable files.
    except Exception as error:
        raise UserError(f"{path} cannot be loaded as a Keras model: {common.first_line(error)}") from error
    return View(model, _title(path), labels or pictures.read_results(path).get("class_names"), open_size)


def _title(path: Path) -> str:
    """The part of a path that distinguishes models, as most files are named model.keras."""
    return path.resolve().parent.name if path.stem == "model" else path.stem


def load_views(
    model: str, compare: str | None, labels: Sequence[str] | None = None, open_size: int = OPEN_SIZE
) -> list[View]:
    """The model and the one to compare it with; at least one must have gates."""
    views = [load_view(path, labels, open_size) for path in (model, compare) if path]
    if not any(view.gates for view in views):
        wanted = "" if compare else "; name one that has with --compare"
        raise UserError(f"no gates (DASLayer) in {' or '.join(filter(None, (model, compare)))}{wanted}")
    lacking = [view.name for view in views if not view.gates and not view.class_names]
    if lacking:
        raise UserError(f"{lacking[0]} has neither gates nor class scores: there is nothing to show")
    return views
