"""`visualize`: where gates sample their feature map, and which parts of it they keep.

Positions are `(y, x)` in pixels of the input image, row before column. An integer is the centre of a pixel,
so an image of H rows extends from -0.5 to H - 0.5. Positions are computed exactly from the strides, paddings
and kernel sizes of the preceding layers, not from the ratio of the sizes: a pixel of a feature map is located
at the centre of its receptive field, including zero padding (Araujo et al., 2019, equations 2 and 3).
Preceding gates and global means do not affect positions. Layers that resize a feature map are assumed to keep
its ends in place.

The functions that draw return a `matplotlib.figure.Figure`; `figure.savefig(path)` writes it. They require
matplotlib, which the extra `viz` installs: `pip install 'keras-das[viz]'`.

Reference:
    - [Araujo et al., 2019](https://distill.pub/2019/computing-receptive-fields)
"""

import contextlib
import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_das._requirements import check_keras_3, import_extra
from keras_das.layers import DASLayer, DeformableConv2D
from keras_das.models.fields import Axis, Field, Fields, fields_of, through, windows_of
from keras_das.models.graph import run
from keras_das.models.samples import Sample, sample_of
from keras_das.ops.deformable import standardize_count

Tensor = Any
Point = tuple[float, float]

_SAMPLING = (DASLayer, DeformableConv2D)
_DPI = 120
_IDLE = 0.02  # deviation from 1 below which a gate counts as idle


class SamplingPoints(NamedTuple):
    """The positions that a layer samples for one output position, and the factor of each sample."""

    points: np.ndarray  # (offset_groups, taps, 2): (y, x) in pixels of the image, taps in row-major order
    mask: np.ndarray  # (offset_groups, taps): factor of each sample; 1 without modulation
    inside: np.ndarray  # (offset_groups, taps): False for samples outside the feature map, which are 0
    position: tuple[int, int]  # row and column of the output position in its feature map
    center: np.ndarray  # (2,): (y, x) of the centre of the output position, in pixels of the image


def sampling_points(
    model: keras.Model, image: Any, layer: str | keras.layers.Layer, point: Sequence[float]
) -> SamplingPoints:
    """Locates the samples of a gate or deformable convolution for one output position.

    The layer samples its input by bilinear interpolation. Each point is the centre of the receptive field of
    a sample, in the image.

    Args:
        model: A Keras model of images with a graph of layers: functional, sequential, or a subclass that
            contains such a network and passes the image to it unchanged.
        image: The input of the model, without a batch axis or as a batch of one: `(H, W, C)`, or `(C, H, W)`
            for channels-first models. For a functional model with several inputs, a list of inputs, or a dict
            with their names. The layer must depend on exactly one image.
        layer: A `DASLayer` or `DeformableConv2D` of the model or of a nested model, or its name.
        point: `(y, x)` in pixels of the image. Selects the output position with the nearest centre.

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
    sample, (found,) = _read(model, image, [layer])
    return found.at(_check_point(model, sample.pixels, point))


def stacked_sampling_points(
    model: keras.Model, image: Any, layers: Sequence[str | keras.layers.Layer], point: Sequence[float]
) -> SamplingPoints:
    """Locates the samples of several consecutive layers for one output position of the last.

    Each point that the last layer samples selects the nearest output position of the preceding layer, and the
    points of that position are located in turn. Two gates of 3x3 taps yield 9x9 points. Masks are multiplied
    along the way. If a sample is outside its feature map, all points derived from it have `inside=False`.

    Args:
        model: See `sampling_points`.
        image: See `sampling_points`.
        layers: Layers or their names, as in `sampling_points`, in any order. They are sorted by their order
            of execution and must be on one path.
        point: See `sampling_points`.

    Returns:
        `SamplingPoints` with all points in one group. `position` and `center` are those of the last layer.

    Raises:
        ValueError: If an argument is invalid. The message names it.

    Example:

    >>> found = keras_das.visualize.stacked_sampling_points(model, image, ["das_p3", "das_p4"], (100, 60))
    >>> found.points.shape
    (1, 81, 2)
    """
    if isinstance(layers, str) or len(layers) < 1:
        raise ValueError(f"`layers` must be a sequence of layers or names. Received: layers={layers!r}")
    sample, (*earlier, last) = _read(model, image, layers)
    found = last.at(_check_point(model, sample.pixels, point))
    points, mask, inside = (x.reshape(-1, *x.shape[2:]) for x in (found.points, found.mask, found.inside))
    for reading in reversed(earlier):
        nested = [reading.at(at) for at in points]
        mask = (mask[:, None] * np.stack([of.mask.ravel() for of in nested])).ravel()
        inside = (inside[:, None] & np.stack([of.inside.ravel() for of in nested])).ravel()
        points = np.concatenate([of.points.reshape(-1, 2) for of in nested])
    return found._replace(points=points[None], mask=mask[None], inside=inside[None])


def gate_map(
    model: keras.Model, image: Any, layer: str | keras.layers.Layer, reduce: str | None = "share"
) -> np.ndarray:
    """Computes the factors by which a gate multiplies its feature map.

    Args:
        model: A Keras model.
        image: See `sampling_points`.
        layer: A `DASLayer` of the model or of a nested model, or its name.
        reduce: String or `None`. How channels are reduced. `"share"` is the share of the feature map's
            magnitude that the gate keeps, `sum |x A| / sum |x|` (the mean where x is 0). `"mean"` is the mean
            of A, which a layer norm keeps near the middle of A's range for every image. `None` returns all
            channels. Defaults to `"share"`.

    Returns:
        float32 array `(h, w)` or `(h, w, channels)` with the size of the feature map, channels last. Values
        are in (0, 1), or in (0, 2) for a gate with `identity_init`.

    Raises:
        ValueError: If an argument is invalid. The message names it.

    Example:

    >>> keras_das.visualize.gate_map(model, image, "das_p4").shape
    (14, 14)

    Reference:
        - [Salajegheh et al., 2023](https://arxiv.org/abs/2311.12091), equation 3
    """
    if reduce not in ("share", "mean", None):
        raise ValueError(f'`reduce` must be "share", "mean" or None. Received: reduce={reduce!r}')
    gate = _find(model, layer, (DASLayer,))
    (inputs,) = _inputs_of(sample_of(model, image, [gate]).run, [gate])
    return _reduced_gate(gate, inputs, reduce)


def gate_inputs(model: keras.Model, images: Any) -> list[tuple[DASLayer, Tensor]]:
    """Runs the model and returns the input of each of its gates.

    Args:
        model: A Keras model.
        images: A batch of inputs. For a model with several inputs, a list or dict of batches.

    Returns:
        Pairs of a gate and its input tensor, in the order of execution, including the gates of nested models.
        Inputs have the batch axis and the data format of the model.

    Raises:
        ValueError: If a gate is called more than once or not at all.
    """
    gates = _of_kind(model, (DASLayer,))
    order: list[Any] = []
    inputs = _inputs_of(lambda: _run(model, images), gates, order)
    by_gate = {id(gate): x for gate, x in zip(gates, inputs, strict=True)}
    return [(gate, by_gate[id(gate)]) for gate in order]


class GateStatistics(NamedTuple):
    """The distribution of a gate's values over a batch of images; see `gate_statistics`."""

    name: str
    mean: float
    deviation: float
    deviation_over_place: float


def gate_statistics(model: keras.Model, images: Any) -> list[GateStatistics]:
    """Measures how selective each gate of a model is.

    Args:
        model: A Keras model.
        images: A batch of inputs. For a model with several inputs, a list or dict of batches.

    Returns:
        One `GateStatistics` for each gate, in the order of execution: `name`, the `mean` and the standard
        `deviation` of all values of the gate, and `deviation_over_place`, the standard deviation over rows
        and columns of the gate's mean over channels, averaged over the images. If the last is near 0, the
        gate selects channels but not locations.

    Raises:
        ValueError: If a gate is called more than once or not at all.

    Example:

    >>> for gate in keras_das.visualize.gate_statistics(model, images):
    ...     print(gate.name, round(gate.deviation_over_place, 3))
    das_p4 0.118
    das_p5 0.154
    """
    return [_statistics(gate, _to_numpy(gate.gate(x))) for gate, x in gate_inputs(model, images)]


def _statistics(gate: DASLayer, values: np.ndarray) -> GateStatistics:
    channels = 3 if gate.data_format == "channels_last" else 1
    by_place = values.mean(axis=channels).reshape(len(values), -1)
    return GateStatistics(
        gate.name, float(values.mean()), float(values.std()), float(by_place.std(axis=1).mean())
    )


def grad_cam(
    model: keras.Model, image: Any, layer: str | keras.layers.Layer, class_index: int | None = None
) -> np.ndarray:
    """Computes a Grad-CAM: the pixels of a feature map that contribute to the score of a class.

    The channels of the layer's output are weighted by the mean gradient of the score and summed. Negative
    values are set to 0. Supports TensorFlow and JAX.

    Args:
        model: A classifier with one output `(N, classes)`, which is the score. After a softmax, the map also
            reflects evidence against the other classes.
        image: See `sampling_points`.
        layer: A layer that outputs a feature map, of the model or of a nested model, or its name.
        class_index: Integer. Index of the class. Defaults to `None`, which selects the class with the highest
            score.

    Returns:
        float32 array `(h, w)` with the size of the feature map, scaled to a maximum of 1, or all zeros if no
        pixel contributes.

    Raises:
        ValueError: If an argument is invalid. The message names it.
        NotImplementedError: If Keras uses another backend.

    Example:

    >>> keras_das.visualize.grad_cam(model, image, "das_p5").shape
    (7, 7)

    Reference:
        - [Selvaraju et al., 2017](https://arxiv.org/abs/1610.02391), equations 1 and 2
    """
    found = _find(model, layer, (keras.layers.Layer,))
    sample = sample_of(model, image, [found])
    with _replaced_call([found], lambda of, call, x: call(x)) as seen:
        outputs = sample.run()
    features = _only(found, [output for _, output in seen[id(found)]])
    if not hasattr(outputs, "shape") or len(outputs.shape) != 2:
        raise ValueError(f"`model` must have one output of shape (N, classes). Received: model={model!r}")
    if not hasattr(features, "shape") or len(features.shape) != 4:
        raise ValueError(f"`layer` must make a feature map. Received: layer={found.name!r}")
    if class_index is None:
        class_index = int(np.argmax(_to_numpy(outputs)[0]))
    if not 0 <= class_index < outputs.shape[1]:
        raise ValueError(
            f"`class_index` must be from 0 to {outputs.shape[1] - 1}. Received: class_index={class_index}"
        )

    def score(change: Tensor) -> Tensor:
        with _replaced_call([found], lambda of, call, x: call(x) + change):
            return sample.run()[0, class_index]

    gradient = _to_numpy(_gradient(score, ops.zeros_like(features)))
    features = _to_numpy(features)
    if _data_format(model) == "channels_first":
        features, gradient = (np.moveaxis(x, 1, -1) for x in (features, gradient))
    cam = np.maximum(np.sum(features * gradient.mean(axis=(1, 2), keepdims=True), axis=-1), 0)[0]
    return cam / cam.max() if cam.max() > 0 else cam


def plot_sampling_points(
    model: keras.Model,
    image: Any,
    layers: str | keras.layers.Layer | Sequence[str | keras.layers.Layer],
    point: Sequence[float],
    picture: np.ndarray | None = None,
) -> Any:
    """Draws the points that are sampled for one position over the image, coloured by their masks.

    A red cross marks the centre of the output position. Grey crosses mark points outside the feature map,
    whose samples are 0.

    Args:
        model: See `sampling_points`.
        image: See `sampling_points`.
        layers: A layer as in `sampling_points`, or several as in `stacked_sampling_points`.
        point: See `sampling_points`.
        picture: Array `(H, W)` or `(H, W, 3)`. The image to draw, if the inputs of the model are not pixels.
            Defaults to `None`, which draws `image`.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If an argument is invalid. The message names it.
        ImportError: If matplotlib is not installed.

    Example:

    >>> figure = keras_das.visualize.plot_sampling_points(model, image, ["das_p3", "das_p4"], (100, 60))
    >>> figure.savefig("points.png")
    """
    figure = _figure(5.5, 4.5)
    if isinstance(layers, str | keras.layers.Layer):
        found = sampling_points(model, image, layers, point)
        names = [layers]
    else:
        found = stacked_sampling_points(model, image, layers, point)
        names = list(layers)
    axes = figure.subplots()
    of = [_find(model, layer, _SAMPLING) for layer in names]
    _show_picture(axes, _picture(model, sample_of(model, image, of).pixels, picture))
    drawn = _scatter(axes, found)
    figure.colorbar(drawn, label="mask" if len(names) == 1 else "product of the masks")
    total, inside = found.inside.size, int(found.inside.sum())
    row, column = found.position
    title = ", ".join(name if isinstance(name, str) else name.name for name in names)
    axes.set_title(f"{title}\nrow {row}, column {column}: {inside} of {total} points on the map")
    return figure


def plot_gates(
    model: keras.Model,
    images: Any,
    layers: Sequence[str | keras.layers.Layer] | None = None,
    point: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> Any:
    """Draws the share of the feature map that each gate keeps (`gate_map`) over each image; brighter is more.

    The colour scale ends at the largest possible value of the gate: 1, or 2 for gates with `identity_init`.
    The title of a column contains the mean of its gate and the deviation over locations (`gate_statistics`).

    Args:
        model: See `sampling_points`.
        images: Images as in `sampling_points`, as a sequence or a batch. Each image is a row.
        layers: Gates or their names. Each gate is a column. Defaults to `None`, which selects all gates of
            the model, in the order of execution.
        point: `(y, x)` in pixels of the image. If given, the points that each gate samples for it are drawn;
            their size is proportional to their mask. Defaults to `None`.
        labels: A text for each image. Defaults to `None`.
        pictures: Arrays `(H, W)` or `(H, W, 3)`. The images to draw, if the inputs of the model are not
            pixels. Defaults to `None`, which draws `images`.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If an argument is invalid. The message names it.
        ImportError: If matplotlib is not installed.

    Example:

    >>> keras_das.visualize.plot_gates(model, images[:4], point=(112, 112)).savefig("gates.png")
    """
    count = len(images)
    for name, values in (("labels", labels), ("pictures", pictures)):
        if values is not None and len(values) != count:
            raise ValueError(f"`{name}` must have one for each of {count} images. Received: {len(values)}")
    _check_built(model)
    gates = layers or _of_kind(model, (DASLayer,))
    if not gates or not count:
        raise ValueError(f"`model` must have gates, and `images` an image. Received: {count} images")
    read = [_read(model, image, gates, (DASLayer,)) for image in images]
    pixels, readings = [sample.pixels for sample, _ in read], [found for _, found in read]
    figure = _figure(2.1 * (1 + len(readings[0])), 2.1 * count + 0.4)
    grid = figure.subplots(count, 1 + len(readings[0]), squeeze=False)
    maps = [[_reduced_gate(of.layer, of.inputs, "share") for of in row] for row in readings]
    tops = [2 if of.layer.identity_init else 1 for of in readings[0]]
    for number, (row, image) in enumerate(zip(grid, pixels, strict=True)):
        picture = _picture(model, image, None if pictures is None else pictures[number])
        _show_picture(row[0], picture)
        row[0].set_ylabel("" if labels is None else labels[number])
        for column, (axes, reading) in enumerate(zip(row[1:], readings[number], strict=True)):
            _show_picture(axes, picture, gray=True)
            gate = maps[number][column]
            shown = _show_map(axes, gate, reading.fields.outputs, cmap="viridis", vmin=0, vmax=tops[column])
            if point is not None:
                _scatter_sizes(axes, reading.at(_check_point(model, image, point)))
            if number == 0:
                drawn = [of_image[column] for of_image in maps]
                spread = np.mean([values.std() for values in drawn])
                size = f"{gate.shape[0]}x{gate.shape[1]}"
                axes.set_title(f"{reading.layer.name}, {size}\n{np.mean(drawn):.2f} ± {spread:.2f}")
            if number == count - 1:
                figure.colorbar(shown, ax=list(grid[:, 1 + column]), orientation="horizontal", shrink=0.8)
    return figure


def plot_grad_cam(
    models: Mapping[str, tuple[keras.Model, str | keras.layers.Layer]],
    image: Any,
    class_index: int | None = None,
    picture: np.ndarray | None = None,
) -> Any:
    """Draws the Grad-CAMs of several models side by side, for example with and without gates.

    Args:
        models: A dict from titles to pairs of a model and a layer; see `grad_cam`.
        image: The input of all models; see `sampling_points`.
        class_index: See `grad_cam`. Defaults to `None`, which selects each model's own class.
        picture: Array `(H, W)` or `(H, W, 3)`. The image to draw, if the inputs of the models are not pixels.
            Defaults to `None`, which draws `image`.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If an argument is invalid. The message names it.
        ImportError: If matplotlib is not installed.

    Example:

    >>> models = {"without": (plain, "conv5_block3_out"), "with DAS": (gated, "das_p5")}
    >>> keras_das.visualize.plot_grad_cam(models, image).savefig("cam.png")
    """
    if not models:
        raise ValueError(f"`models` must hold a model. Received: models={models!r}")
    figure = _figure(3.2 * (1 + len(models)), 3.7)
    first, *others = figure.subplots(1, 1 + len(models))
    first_model, first_layer = next(iter(models.values()))
    first_sample = sample_of(first_model, image, [_find(first_model, first_layer, (keras.layers.Layer,))])
    shown = _picture(first_model, first_sample.pixels, picture)
    _show_picture(first, shown)
    first.set_title("image")
    for axes, (title, (model, layer)) in zip(others, models.items(), strict=True):
        found = _find(model, layer, (keras.layers.Layer,))
        _show_picture(axes, shown, gray=True)
        heat = grad_cam(model, image, found, class_index)
        field = _fields(sample_of(model, image, [found]), [found])[0].outputs
        drawn = _show_map(axes, heat, field, cmap="inferno", vmin=0, vmax=1)
        axes.set_title(f"{title}\n{found.name}")
    figure.colorbar(drawn, ax=[first, *others], label="Grad-CAM", shrink=0.8)
    return figure


def plot_history(
    files: Mapping[str, str | os.PathLike], metrics: Sequence[str] | None = None, epoch: str = "epoch"
) -> Any:
    """Draws training curves from files of `keras.callbacks.CSVLogger`.

    Args:
        files: A dict from names of runs to files.
        metrics: Columns to draw, one panel each. A `val_` column is a dashed line in the panel of its metric.
            Defaults to `None`, which selects all columns.
        epoch: String. The column with the epoch. Defaults to `"epoch"`.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If a file has no column of epochs, or no file has one of the metrics.
        OSError: If a file cannot be read.
        ImportError: If matplotlib is not installed.

    Example:

    >>> files = {"DAS": "runs/das/history.csv", "none": "runs/none/history.csv"}
    >>> keras_das.visualize.plot_history(files, ["loss", "accuracy"]).savefig("curves.png")
    """
    runs = {name: _columns(path, epoch) for name, path in files.items()}
    names = dict.fromkeys(name.removeprefix("val_") for run in runs.values() for name in run if name != epoch)
    chosen = list(names) if metrics is None else list(metrics)
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        raise ValueError(f"`metrics` must be among {list(names)}. Received: metrics={metrics!r}")
    figure = _figure(4.2 * len(chosen), 3.2)
    for axes, metric in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        for number, (name, columns) in enumerate(runs.items()):
            for column, style in ((metric, "-"), (f"val_{metric}", "--")):
                if column in columns:
                    label = f"{name}, validation" if style == "--" else name
                    axes.plot(columns[epoch], columns[column], style, color=f"C{number}", label=label)
        axes.set(xlabel="epoch", title=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


class TensorBoardFigures(keras.callbacks.Callback):
    """Callback that writes figures of a model's gates to TensorBoard during training.

    Every N epochs, it writes the gates with their sampling points for all images (`plot_gates`), and the
    sampling points of each gate for the first image (`plot_sampling_points`). Requires TensorFlow, matplotlib
    and the package tensorboard.

    Args:
        log_dir: TensorBoard's folder.
        images: Images as in `plot_gates`.
        every: Integer. Number of epochs between figures. Defaults to `1`.
        point: `(y, x)` in pixels of the image. Defaults to `None`, which selects the centre.
        labels: See `plot_gates`. Defaults to `None`.
        pictures: See `plot_gates`. Defaults to `None`.

    Raises:
        ValueError: If `every` is not a positive integer, or, when training begins, if the model has no gates.
        ImportError: If matplotlib or tensorboard is not installed.

    Example:

    >>> figures = keras_das.visualize.TensorBoardFigures("logs", images[:4], every=5)
    >>> model.fit(images, targets, callbacks=[figures])
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        images: Any,
        every: int = 1,
        point: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        pictures: Sequence[np.ndarray] | None = None,
    ):
        """Validates and stores the arguments."""
        super().__init__()
        for package in ("matplotlib.figure", "tensorboard"):
            import_extra(package, "viz")  # fails now instead of after the first epochs
        self.log_dir, self.images = str(log_dir), images
        self.every = standardize_count(every, "every")
        self.point, self.labels, self.pictures = point, labels, pictures

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that the model has gates."""
        if not _names(self.model, (DASLayer,)):
            raise ValueError(f"`model` must have gates. Received: model={self.model!r}")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the figures every N epochs."""
        if (epoch + 1) % self.every:
            return
        import tensorflow as tf

        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default():
            for name, figure in self._figures():
                tf.summary.image(name, _to_pixels(figure)[None], step=epoch)
        writer.close()

    def _figures(self) -> Iterator[tuple[str, Any]]:
        gates = _of_kind(self.model, (DASLayer,))
        shape = sample_of(self.model, self.images[0], gates).pixels.shape
        rows, columns = _image_size(shape, _data_format(self.model))
        point = ((rows - 1) / 2, (columns - 1) / 2) if self.point is None else self.point
        yield "gates", plot_gates(self.model, self.images, None, point, self.labels, self.pictures)
        picture = None if self.pictures is None else self.pictures[0]
        for name in _names(self.model, (DASLayer,)):
            yield (
                f"sampling_points/{name}",
                plot_sampling_points(self.model, self.images[0], name, point, picture),
            )


class GateMonitor(keras.callbacks.Callback):
    """Callback that measures how selective a model's gates are, and reports gates that are not.

    The gates are measured after each epoch. When training ends, one line names the gates with `identity_init`
    whose values are still within 2 % of 1, and suggests changes.

    Args:
        images: A batch of inputs of the model on which the gates are measured.
        log_dir: TensorBoard's folder for the statistics. Requires TensorFlow and the package tensorboard.
            Defaults to `None`, which writes nothing.

    Attributes:
        history: A dict from the name of each gate to its `GateStatistics`, one per epoch.

    Example:

    >>> monitor = keras_das.visualize.GateMonitor(images[:32])
    >>> model.fit(images, targets, callbacks=[monitor])
    >>> monitor.history["das_p5"][-1].deviation_over_place
    0.154
    """

    def __init__(self, images: Any, log_dir: str | os.PathLike | None = None):
        """Stores the arguments."""
        super().__init__()
        if log_dir is not None:
            import_extra("tensorboard", "viz")
        self.images, self.log_dir = images, log_dir
        self.history: dict[str, list[GateStatistics]] = {}

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Measures the gates."""
        measured = gate_statistics(self.model, self.images)
        for gate in measured:
            self.history.setdefault(gate.name, []).append(gate)
        if self.log_dir is not None:
            _write_scalars(str(self.log_dir), measured, epoch)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Reports the gates that stayed close to 1."""
        gates = {gate.name: gate for gate in _of_kind(self.model, (DASLayer,)) if gate.identity_init}
        latest = [measured[-1] for name, measured in self.history.items() if name in gates]
        idle = [gate.name for gate in latest if abs(gate.mean - 1) + gate.deviation < _IDLE]
        if idle:
            print(
                f"Gates within {_IDLE:.0%} of 1: {', '.join(idle)}. They select next to nothing. Train "
                "longer, raise the gates' learning rate or `identity_gain`, or use `identity_init=False`."
            )


def _write_scalars(log_dir: str, measured: Sequence[GateStatistics], epoch: int) -> None:
    import tensorflow as tf

    writer = tf.summary.create_file_writer(log_dir)
    with writer.as_default():
        for gate in measured:
            for field in gate._fields[1:]:
                tf.summary.scalar(f"{gate.name}/{field}", getattr(gate, field), step=epoch)
    writer.close()


# Reading the layers


class _Reading(NamedTuple):
    """One layer in one run of the model, with its input."""

    layer: Any
    inputs: Tensor
    fields: Fields

    def at(self, point: Sequence[float]) -> SamplingPoints:
        """Returns the sampling points of the output position nearest to a point in the image."""
        offsets, mask = self.layer.predict_offsets(self.inputs)
        windows = windows_of(self.layer)
        grid = through(self.fields.inputs, windows)
        row, column = (axis.nearest(value) for axis, value in zip(grid, point, strict=True))
        taps = np.moveaxis(np.indices([window.kernel for window in windows]), 0, -1).reshape(-1, 2)
        first = [
            index * window.stride - window.pad_before(axis.size)
            for index, window, axis in zip((row, column), windows, self.fields.inputs, strict=True)
        ]
        moved = _to_numpy(offsets)[0, row, column].reshape(-1, len(taps), 2)  # dy before dx
        at = np.array(first) + taps * [window.dilation for window in windows] + moved
        sizes = np.array([axis.size for axis in self.fields.inputs])
        located = [axis.locate(at[..., i]) for i, axis in enumerate(self.fields.inputs)]
        return SamplingPoints(
            np.stack(located, axis=-1),
            np.ones(at.shape[:2]) if mask is None else _to_numpy(mask)[0, row, column].reshape(at.shape[:2]),
            np.all((at > -1) & (at < sizes), axis=-1),
            (row, column),
            np.array([axis.locate(index) for axis, index in zip(grid, (row, column), strict=True)]),
        )


def _read(
    model: keras.Model,
    image: Any,
    layers: Sequence[str | keras.layers.Layer],
    kinds: tuple[type, ...] = _SAMPLING,
) -> tuple[Sample, list[_Reading]]:
    """Runs the model on one image. Returns the readings of the layers in the order of execution."""
    _check_built(model)
    found = [_find(model, layer, kinds) for layer in layers]
    sample = sample_of(model, image, found)
    order: list[Any] = []
    inputs = _inputs_of(sample.run, found, order)
    fields = _fields(sample, found)
    readings = {id(of): _Reading(of, x, field) for of, x, field in zip(found, inputs, fields, strict=True)}
    return sample, [readings[id(of)] for of in order]


def _run(model: keras.Model, images: Any) -> Any:
    """Returns the model's outputs for a batch, for all inputs if there are several."""
    several = isinstance(model, keras.Function) and len(model.inputs) > 1
    if several and not isinstance(images, list | tuple | Mapping):
        names = [tensor.name for tensor in model.inputs]
        raise ValueError(f"`images` must be a list or dict of batches for the model's inputs {names}.")
    return model(images, training=False) if several else run(model, images)


def _inputs_of(
    run_model: Callable[[], Any], layers: Sequence[Any], order: list[Any] | None = None
) -> list[Tensor]:
    """Runs the model and returns the input of each layer. `order` collects the layers as they run."""
    ran: list[Any] = [] if order is None else order

    def note(layer: Any, call: Callable[..., Any], x: Tensor) -> Any:
        ran.append(layer)
        return call(x)

    with _replaced_call(layers, note) as seen:
        run_model()
    return [_only(layer, [x for x, _ in seen[id(layer)]]) for layer in layers]


@contextlib.contextmanager
def _replaced_call(
    layers: Sequence[Any], replacement: Callable[[Any, Callable[..., Any], Tensor], Any]
) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Context in which the layers compute `replacement(layer, call, x)`. Yields inputs and outputs by `id`.

    Unlike a model of the same layers, this also works for nested models and subclasses.
    """
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {id(layer): [] for layer in layers}

    def replaced(layer: Any) -> Callable[..., Any]:
        original = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            output = replacement(layer, lambda x: original(x, *args[1:], **kwargs), args[0])
            seen[id(layer)].append((args[0], output))
            return output

        return call

    try:
        for layer in layers:  # bypasses Keras' __setattr__, which tracks state
            object.__setattr__(layer, "call", replaced(layer))
        yield seen
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _only(layer: Any, values: Sequence[Tensor]) -> Tensor:
    if len(values) != 1:
        raise ValueError(
            f"`layer` must be called once when the model runs. Received: layer={layer.name!r}, which is "
            f"called {len(values)} times"
        )
    return values[0]


def _reduced_gate(gate: DASLayer, inputs: Tensor, reduce: str | None) -> np.ndarray:
    values, features = _to_numpy(gate.gate(inputs))[0], _to_numpy(inputs)[0]
    if gate.data_format == "channels_first":
        values, features = (np.moveaxis(x, 0, -1) for x in (values, features))
    return _reduce(values, features, reduce)


def _reduce(values: np.ndarray, features: np.ndarray, reduce: str | None) -> np.ndarray:
    """Reduces the channels of a gate `(h, w, channels)`, weighted by feature magnitudes for "share"."""
    if reduce is None:
        return values
    weights = np.abs(features) if reduce == "share" else np.ones_like(features)
    weights[weights.sum(axis=-1) == 0] = 1
    return np.average(values, axis=-1, weights=weights)


def _fields(sample: Sample, layers: Sequence[Any]) -> list[Fields]:
    """Returns the positions of the inputs and outputs of the layers."""
    model = sample.model
    data_format = _data_format(model)
    size = _image_size(sample.pixels.shape, data_format)
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
        "`layer` must be part of a graph of layers, functional or sequential, on the path of the image: its "
        f"place in the image is not known otherwise. Received: {missing}"
    )


def _networks(model: keras.Model) -> list[keras.Model]:
    """Returns the model if it is a graph of layers, otherwise its inner graphs of images, outermost first."""
    graphs = keras.Sequential | keras.Function
    if isinstance(model, graphs):
        return [model]
    inside = model._flatten_layers(include_self=False)
    built = [layer for layer in inside if isinstance(layer, graphs) and layer.built]
    return [layer for layer in built if [len(tensor.shape) for tensor in layer.inputs] == [4]]


def _of_kind(model: keras.Model, kinds: tuple[type, ...]) -> list[Any]:
    """Returns the layers of these classes, including those of nested models but not the parts of gates."""
    _check_built(model)
    layers = model._flatten_layers(include_self=False)
    parts = {
        id(part)
        for layer in layers
        if isinstance(layer, DASLayer)
        for part in layer._flatten_layers(include_self=False)
    }
    return [layer for layer in layers if isinstance(layer, kinds) and id(layer) not in parts]


def _names(model: keras.Model, kinds: tuple[type, ...]) -> list[str]:
    return [layer.name for layer in _of_kind(model, kinds)]


def _find(model: keras.Model, layer: str | keras.layers.Layer, kinds: tuple[type, ...]) -> Any:
    known = _of_kind(model, kinds)
    found = [of for of in known if of is layer or of.name == layer]
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(kind.__name__ for kind in kinds)
    names = [of.name for of in known]
    problem = f"{len(found)} have this name" if found else f"the model has {names}"
    raise ValueError(
        f"`layer` must be a {wanted} of the model, or its name. Received: layer={layer!r}; {problem}"
    )


def _data_format(model: keras.Model) -> str:
    """Returns the model's data format: that of its first layer that has one."""
    for layer in model._flatten_layers(include_self=False):
        if data_format := getattr(layer, "data_format", None):
            return data_format
    return keras.config.image_data_format()


def _image_size(shape: Sequence[int], data_format: str) -> tuple[int, int]:
    return (shape[0], shape[1]) if data_format == "channels_last" else (shape[1], shape[2])


def _check_built(model: keras.Model) -> None:
    check_keras_3("model", model)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a Keras model that has been built. Received: model={model!r}")


def _check_point(model: keras.Model, image: np.ndarray, point: Sequence[float]) -> Point:
    size = _image_size(image.shape, _data_format(model))
    values = np.asarray(point, "float64")
    if values.shape != (2,) or not all(-0.5 <= at <= end - 0.5 for at, end in zip(values, size, strict=True)):
        raise ValueError(
            f"`point` must be (y, x) in pixels of the image, from -0.5 to {size[0] - 0.5} and "
            f"{size[1] - 0.5}. Received: point={point!r}"
        )
    return float(values[0]), float(values[1])


def _gradient(score: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Returns the gradient of a scalar function of a tensor."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(at)
            value = score(at)
        return tape.gradient(value, at, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    if backend == "jax":
        import jax

        return jax.grad(score)(at)
    raise NotImplementedError(f"Grad-CAM needs Keras on TensorFlow or JAX. Received: backend {backend!r}")


def _to_numpy(x: Tensor) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(x, "float32"))


# Drawing


def _figure(width: float, height: float) -> Any:
    """Creates an empty figure, with its size in inches, that is not shown in a window."""
    return import_extra("matplotlib.figure", "viz").Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained"
    )


def _to_pixels(figure: Any) -> np.ndarray:
    """Returns the figure as uint8 `(h, w, 4)`."""
    canvas = import_extra("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def _picture(model: keras.Model, pixels: np.ndarray, picture: np.ndarray | None) -> np.ndarray:
    """Returns the picture to draw for an image: float32 in 0..1, `(H, W)` or `(H, W, 3)`."""
    size = _image_size(pixels.shape, _data_format(model))
    if picture is None:
        pixels = pixels if _data_format(model) == "channels_last" else np.moveaxis(pixels, 0, -1)
        picture = pixels if pixels.shape[2] == 3 else pixels.mean(axis=2)
    if picture.shape not in (size, (*size, 3)):
        raise ValueError(
            f"`picture` must have the shape {size} or {(*size, 3)}. Received: picture.shape={picture.shape}"
        )
    values = picture.astype("float32")
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255:
        is_bytes = high > 1 or np.issubdtype(picture.dtype, np.integer)
        return values / 255 if is_bytes else values
    return (values - low) / (high - low)


def _show_picture(axes: Any, picture: np.ndarray, gray: bool = False) -> None:
    if gray and picture.ndim == 3:
        picture = picture.mean(axis=2)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


def _show_map(axes: Any, values: np.ndarray, field: Field, **style: Any) -> Any:
    """Draws a feature map over the picture, interpolated between pixel centres and constant beyond them."""
    columns, rows = (round(max(ends) + 0.5) for ends in (axes.get_xlim(), axes.get_ylim()))
    spread = _interpolate(_interpolate(values, field[0], rows).T, field[1], columns).T
    return axes.imshow(spread, alpha=0.65, **style)


def _interpolate(values: np.ndarray, axis: Axis, size: int) -> np.ndarray:
    """Interpolates `(axis.size, n)` values at each of `size` pixels of the image, along the first axis."""
    middles = axis.locate(np.arange(axis.size))
    return np.stack([np.interp(np.arange(size), middles, line) for line in values.T], axis=-1)


def _scatter(axes: Any, found: SamplingPoints) -> Any:
    """Draws the points, coloured by their masks."""
    limits = axes.get_xlim(), axes.get_ylim()
    y, x = np.moveaxis(found.points.reshape(-1, 2), -1, 0)  # drawn as x, y
    inside, mask = found.inside.ravel(), found.mask.ravel()
    axes.scatter(x[~inside], y[~inside], s=25, c="lightgray", marker="x")
    drawn = axes.scatter(
        x[inside], y[inside], s=40, c=mask[inside], cmap="viridis", vmin=0, vmax=1, edgecolors="white"
    )
    axes.plot(found.center[1], found.center[0], "r+", markersize=12, markeredgewidth=2)
    axes.set(xlim=limits[0], ylim=limits[1])
    return drawn


def _scatter_sizes(axes: Any, found: SamplingPoints) -> None:
    """Draws the points, sized by their masks."""
    limits = axes.get_xlim(), axes.get_ylim()
    y, x = np.moveaxis(found.points[found.inside], -1, 0)
    axes.scatter(x, y, s=40 * found.mask[found.inside], c="white", edgecolors="red", linewidths=0.8)
    axes.set(xlim=limits[0], ylim=limits[1])


def _columns(path: str | os.PathLike, epoch: str) -> dict[str, list[float]]:
    """Reads the columns of numbers of a CSV file. An empty cell is NaN."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or epoch not in rows[0]:
        raise ValueError(f"`files` must hold rows with the column {epoch!r}. Received: {os.fspath(path)!r}")
    columns = {}
    for name in rows[0]:
        with contextlib.suppress(ValueError):  # columns of text are not drawn
            columns[name] = [float(row[name] or math.nan) for row in rows]
    return columns
