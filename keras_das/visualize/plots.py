"""The figures: sampling points, gates, Grad-CAMs and training curves."""

import contextlib
import csv
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_das.layers import DASLayer
from keras_das.models.graph import check_built
from keras_das.visualize import drawing
from keras_das.visualize.gates import reduced_gate
from keras_das.visualize.gradcam import grad_cam
from keras_das.visualize.lookup import as_layers, find_layer, layers_of_kind
from keras_das.visualize.samples import sample_of
from keras_das.visualize.sampling import (
    SAMPLING_LAYERS,
    Reading,
    check_point,
    fields_in,
    read_layers,
    sampling_points,
    stacked_sampling_points,
)

_MISSING = (None, "", "NA")  # cells without a number


def plot_sampling_points(
    model: keras.Model,
    image: Any,
    layers: str | keras.layers.Layer | Sequence[str | keras.layers.Layer],
    point: Sequence[float],
    picture: np.ndarray | None = None,
) -> Any:
    """Draws the points that are sampled for one position over the image, colored by their masks.

    A red cross marks the center of the output position. Gray crosses mark points outside the feature map,
    whose samples are 0.

    Args:
        model: Keras model; see `sampling_points`.
        image: Array, list or dict; see `sampling_points`.
        layers: Layer or name as in `sampling_points`, or a sequence as in `stacked_sampling_points`.
        point: `(y, x)` in pixels of the image.
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
    figure = drawing.new_figure(5.5, 4.5)
    if isinstance(layers, str | keras.layers.Layer):
        found = sampling_points(model, image, layers, point)
        names = [layers]
    else:
        found = stacked_sampling_points(model, image, layers, point)
        names = list(layers)
    axes = figure.subplots()
    of = [find_layer(model, layer, SAMPLING_LAYERS) for layer in names]
    drawing.show_picture(
        axes, drawing.standardize_picture(model, sample_of(model, image, of).pixels, picture)
    )
    drawn = drawing.scatter_colored(axes, found)
    figure.colorbar(drawn, label="mask" if len(names) == 1 else "product of the masks")
    total, inside = found.inside.size, int(found.inside.sum())
    row, column = found.position
    title = ", ".join(name if isinstance(name, str) else name.name for name in names)
    axes.set_title(f"{title}\nrow {row}, column {column}: {inside} of {total} points on the map")
    return figure


def plot_gates(
    model: keras.Model,
    images: Any,
    layers: str | keras.layers.Layer | Sequence[str | keras.layers.Layer] | None = None,
    point: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
) -> Any:
    """Draws the share of the feature map that each gate keeps (`gate_map`) over each image; brighter is more.

    The color scale ends at the largest possible value of the gate: 1, or 2 for gates with `identity_init`.
    The title of a column contains the mean and the standard deviation over locations of the maps drawn.

    Args:
        model: Keras model; see `sampling_points`.
        images: Sequence or batch of images as in `sampling_points`. Each image is a row.
        layers: Gate or its name, or a sequence of these. Each gate is a column. Defaults to `None`, which
            selects all gates of the model, in the order of execution.
        point: `(y, x)` in pixels of the image. If given, the points that each gate samples for it are drawn;
            their size is proportional to their mask. Defaults to `None`.
        labels: Sequence of strings, one for each image. Defaults to `None`.
        pictures: Sequence of arrays `(H, W)` or `(H, W, 3)`. The images to draw, if the inputs of the model
            are not pixels. Defaults to `None`, which draws `images`.

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
            raise ValueError(
                f"`{name}` must contain one value for each of {count} images. Received: {len(values)}"
            )
    check_built(model)
    gates = layers_of_kind(model, (DASLayer,)) if layers is None else as_layers(layers)
    if not gates or not count:
        raise ValueError(
            f"`model` must contain gates, and `images` at least one image. Received: {count} images"
        )
    read = [read_layers(model, image, gates, (DASLayer,)) for image in images]
    columns = len(read[0][1])
    figure = drawing.new_figure(2.1 * (1 + columns), 2.1 * count + 0.4)
    grid = figure.subplots(count, 1 + columns, squeeze=False)
    shown = []
    for number, (row, (sample, _)) in enumerate(zip(grid, read, strict=True)):
        shown.append(
            drawing.standardize_picture(model, sample.pixels, None if pictures is None else pictures[number])
        )
        drawing.show_picture(row[0], shown[-1])
        row[0].set_ylabel("" if labels is None else labels[number])
    for column in range(columns):
        axes, readings = grid[:, 1 + column], [found[column] for _, found in read]
        at = None if point is None else [check_point(model, sample.pixels, point) for sample, _ in read]
        drawn = _draw_gate(axes, readings, shown, at)
        figure.colorbar(drawn, ax=list(axes), orientation="horizontal", shrink=0.8)
    return figure


def _draw_gate(
    column: Sequence[Any],
    readings: Sequence[Reading],
    pictures: Sequence[np.ndarray],
    points: Sequence[Sequence[float]] | None,
) -> Any:
    """Draws a gate for each image into a column of axes. Returns a drawing with the color scale."""
    gate = readings[0].layer
    maps = [reduced_gate(gate, reading.inputs, "share") for reading in readings]
    for number, (axes, reading) in enumerate(zip(column, readings, strict=True)):
        drawing.show_picture(axes, pictures[number], gray=True)
        top = 2 if gate.identity_init else 1
        drawn = drawing.show_map(axes, maps[number], reading.fields.outputs, cmap="viridis", vmin=0, vmax=top)
        if points is not None:
            drawing.scatter_sized(axes, reading.at(points[number]))
    mean, spread = np.mean(maps), np.mean([values.std() for values in maps])
    rows, columns = maps[0].shape
    column[0].set_title(f"{gate.name}, {rows}x{columns}\n{mean:.2f} ± {spread:.2f}")
    return drawn


def plot_grad_cam(
    models: Mapping[str, tuple[keras.Model, str | keras.layers.Layer]],
    image: Any,
    class_index: int | None = None,
    picture: np.ndarray | None = None,
) -> Any:
    """Draws the Grad-CAMs of several models side by side, for example with and without gates.

    Args:
        models: Dict from titles to pairs of a model and a layer; see `grad_cam`.
        image: Array, list or dict. The input of all models; see `sampling_points`.
        class_index: Integer. See `grad_cam`. Defaults to `None`, which selects each model's own class.
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
    if not isinstance(models, Mapping) or not models:
        raise ValueError(f"`models` must be a dict with at least one model. Received: models={models!r}")
    figure = drawing.new_figure(3.2 * (1 + len(models)), 3.7)
    first, *others = figure.subplots(1, 1 + len(models))
    first_model, layer = next(iter(models.values()))
    found = find_layer(first_model, layer, (keras.layers.Layer,))
    shown = drawing.standardize_picture(first_model, sample_of(first_model, image, [found]).pixels, picture)
    drawing.show_picture(first, shown)
    first.set_title("image")
    for axes, (title, (model, layer)) in zip(others, models.items(), strict=True):
        found = find_layer(model, layer, (keras.layers.Layer,))
        drawing.show_picture(axes, shown, gray=True)
        heat = grad_cam(model, image, found, class_index)
        field = fields_in(sample_of(model, image, [found]), [found])[0].outputs
        drawn = drawing.show_map(axes, heat, field, cmap="inferno", vmin=0, vmax=1)
        axes.set_title(f"{title}\n{found.name}")
    figure.colorbar(drawn, ax=[first, *others], label="Grad-CAM", shrink=0.8)
    return figure


def plot_history(
    files: Mapping[str, str | os.PathLike], metrics: Sequence[str] | None = None, epoch: str = "epoch"
) -> Any:
    """Draws training curves from files of `keras.callbacks.CSVLogger`.

    Args:
        files: Dict from names of runs to paths of files.
        metrics: Sequence of strings. Columns to draw, one panel each. A `val_` column is a dashed line in the
            panel of its metric. Defaults to `None`, which selects all columns.
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
    figure = drawing.new_figure(4.2 * len(chosen), 3.2)
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


def _columns(path: str | os.PathLike, epoch: str) -> dict[str, list[float]]:
    """Reads the columns of numbers of a CSV file. A cell that is empty or "NA", as in Keras' logs, is NaN."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    columns = {}
    for name in reader.fieldnames or ():
        with contextlib.suppress(ValueError):  # columns of text are not drawn
            columns[name] = [math.nan if row[name] in _MISSING else float(row[name]) for row in rows]
    if not rows or epoch not in columns:
        raise ValueError(
            f"`files` must contain rows with numbers in the column {epoch!r}. Received: {os.fspath(path)!r}"
        )
    return columns
