"""Draws the figures of the documentation into docs/images.

python docs/figures.py runs/demo/model.keras    # after `make demo`, on photographs of its test split
python docs/figures.py --clutter runs/accuracy/clutter/das_dilation_2_slow_offsets-2.keras

The second command draws the gates of a model that benchmarks/accuracy.py has trained.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import keras
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras_das
from examples import data
from examples.data import pipeline

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CLUTTERED = (3, 5, 8, 11, 14, 17, 20)
"""The cluttered test images that are drawn."""
GATES = ("das_stage1", "das_stage2")
PICTURE, POINT = 250, (31.5, 31.5)
"""The image of the test split that is drawn, and the point `(y, x)` whose sampled positions are shown."""
MAP, WORK, LEARNT = "#dbe7f5", "#f3f3f3", "#fbe6cf"  # feature maps, layers, predictions


def main() -> None:
    """Draws all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="the model of `make demo`: runs/demo/model.keras")
    parser.add_argument("--clutter", type=Path, help="a model of `benchmarks/accuracy.py run clutter`")
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "keras_das"  # reproducible files
    save(draw_gate(), "gate.svg")
    save(draw_border(), "border.svg")
    if options.model:
        model = keras.models.load_model(options.model, compile=False)
        save(draw_taps(model, test_picture()), "taps.png")
    if options.clutter:
        save(draw_selection(keras.models.load_model(options.clutter, compile=False)), "selection.png")


def save(figure: Figure, name: str) -> None:
    """Writes a figure without dates and versions."""
    unwanted = "Date" if name.endswith(".svg") else "Software"
    figure.savefig(IMAGES / name, dpi=110, metadata={unwanted: None})


def test_picture() -> np.ndarray:
    """Returns a photograph of the demonstration's test split."""
    dataset = data.load("trees", 64, 0)
    batches = pipeline.evaluation_batches(dataset.splits["test"], len(dataset.class_names), PICTURE + 1)
    images, _ = next(iter(batches))
    return np.asarray(images)[PICTURE]


def draw_gate() -> Figure:
    """Draws the data flow of a gate."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.1, 19.4), ylim=(-0.5, 6.1))
    axes.axis("off")
    upper, lower = 2.6, 0.0
    boxes = [
        (0.0, upper, 1.5, "$X$\n$C$ channels", MAP),
        (2.2, upper, 2.6, "depthwise 3x3\npointwise\n$C → C'$", WORK),
        (5.5, upper, 2.2, "instance norm\nGELU", WORK),
        (8.4, upper, 1.6, "$X_c$\n$C'$ channels", MAP),
        (10.7, upper, 3.0, "deformable\ndepthwise 3x3\npointwise $C' → C$", WORK),
        (14.4, upper, 1.9, "layer norm\nsigmoid", WORK),
        (17.0, upper, 1.5, "$A$\n$C$ channels", MAP),
        (8.0, lower, 2.4, "convolution 3x3\n(starts at zero)", WORK),
        (10.7, lower, 3.0, "per tap: offset $(dy, dx)$\nand mask $m$", LEARNT),
    ]
    for left, bottom, width, text, color in boxes:
        _box(axes, left, bottom, width, text, color)
    middle = upper + 0.8
    for start, end in ((1.5, 2.2), (4.8, 5.5), (7.7, 8.4), (10.0, 10.7), (13.7, 14.4), (16.3, 17.0)):
        _arrow(axes, (start, middle), (end, middle))
    _arrow(axes, (9.2, upper), (9.2, lower + 1.6))
    _arrow(axes, (10.4, lower + 0.8), (10.7, lower + 0.8))
    _arrow(axes, (12.2, lower + 1.6), (12.2, upper))
    axes.plot([0.75, 0.75, 17.4], [upper + 1.6, 5.4, 5.4], color="black", linewidth=1)
    axes.text(17.75, 5.4, r"$\times$", ha="center", va="center", fontsize=15)
    axes.text(18.2, 5.4, "$X_{out}$", ha="left", va="center", fontsize=11)
    _arrow(axes, (17.75, upper + 1.6), (17.75, 5.1))
    for x, number in ((3.5, 1), (12.2, 2), (15.35, 3)):
        axes.text(x, upper + 1.75, f"({number})", ha="center", va="bottom", color="0.4")
    axes.text(17.3, 5.55, "(4)", ha="right", va="bottom", color="0.4")
    return figure


def _box(axes: Axes, left: float, bottom: float, width: float, text: str, color: str) -> None:
    style = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch((left, bottom), width, 1.6, boxstyle=style, facecolor=color))
    axes.text(left + width / 2, bottom + 0.8, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0})


def draw_border() -> Figure:
    """Draws samples at and beyond the border of an image of ones with five rows."""
    y = np.linspace(-2, 6, 321).astype("float32")
    offsets = np.zeros((len(y), 5, 5, 2), "float32")
    offsets[..., 0] = y[:, None, None] - np.arange(5)[:, None]
    ones = np.ones((len(y), 5, 5, 1), "float32")
    samples = keras_das.ops.deformable_conv2d(ones, np.ones((1, 1, 1, 1), "float32"), offsets)
    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-0.5, 4.5, color=MAP, label="the image: rows 0 to 4")
    axes.plot(y, keras.ops.convert_to_numpy(samples)[:, 0, 2, 0], color="C1")
    axes.set(xlabel="y of the sample", ylabel="its value", xticks=range(-2, 7), yticks=(0, 0.5, 1))
    axes.legend(loc="lower center", fontsize="small")
    return figure


def draw_taps(model: keras.Model, picture: np.ndarray) -> Figure:
    """Draws the nine points of two gates, before and after training, colored by their masks."""
    after = [keras_das.visualize.sampling_points(model, picture, name, POINT) for name in GATES]
    for gate, _ in keras_das.visualize.gate_inputs(model, picture[None]):
        for weight in (gate.deform.offset_kernel, gate.deform.offset_bias):
            weight.assign(np.zeros(weight.shape))  # as they start
    before = [keras_das.visualize.sampling_points(model, picture, name, POINT) for name in GATES]
    figure = Figure(figsize=(9.6, 2.7), layout="constrained")
    grid = figure.subplots(1, 2 * len(GATES))
    columns = [found for pair in zip(before, after, strict=True) for found in pair]
    for number, (axes, found) in enumerate(zip(grid, columns, strict=True)):
        drawn = _scatter(axes, picture, found)
        when = "after training" if number % 2 else "at the start"
        axes.set_title(f"{GATES[number // 2]}, {when}", fontsize=10)
    figure.colorbar(drawn, ax=grid, label="mask")
    return figure


def draw_selection(model: keras.Model) -> Figure:
    """Draws two gates of a model on cluttered digits, from 0 to 2, with the boxes of the digits."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import clutter

    _, test = clutter.load(train=1, test=CLUTTERED[-1] + 1, fragments=8, scale=(1.5, 4.0))
    gates = [layer for layer in model.layers if isinstance(layer, keras_das.DASLayer)][:2]
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    grid = figure.subplots(1 + len(gates), len(CLUTTERED))
    side = test.images.shape[1] - 0.5
    for column, number in zip(grid.T, CLUTTERED, strict=True):
        picture, ((top, left, bottom, right),) = test.images[number], test.boxes[number]
        column[0].imshow(picture)
        for axes, gate in zip(column[1:], gates, strict=True):
            values = keras_das.visualize.gate_map(model, picture.astype("float32"), gate, reduce="mean")
            drawn = axes.imshow(values, cmap="coolwarm", vmin=0, vmax=2, extent=(-0.5, side, side, -0.5))
            axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "k", linewidth=1)
        for axes in column:
            axes.set(xticks=[], yticks=[])
    for axes, label in zip(grid[:, 0], ("image", "gate, 32x32", "gate, 16x16"), strict=True):
        axes.set_ylabel(label)
    figure.colorbar(drawn, ax=grid[1:], label="gate, mean over channels")
    return figure


def _scatter(axes: Axes, picture: np.ndarray, found: keras_das.visualize.SamplingPoints) -> Any:
    axes.imshow(picture.astype("uint8"), interpolation="nearest")
    axes.axis("off")
    y, x = found.center
    axes.plot(x, y, "+", color="red", markersize=10, zorder=3)
    y, x = found.points[0][found.inside[0]].T
    mask = found.mask[0][found.inside[0]]
    return axes.scatter(x, y, c=mask, cmap="viridis", vmin=0, vmax=1, s=50, edgecolors="white", zorder=2)


if __name__ == "__main__":
    main()
