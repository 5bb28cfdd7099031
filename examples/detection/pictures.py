"""Pictures of detections next to the truth."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib import patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.detection.coco_metrics import Boxes

_COLOURS = ("#ff7f0e", "#1f77ff", "#e03030", "#a050ff", "#00b0b0", "#ff50c0")
_TRUTH = "#30ff60"


def draw_sheet(
    images: Sequence[np.ndarray],
    truths: Sequence[Boxes],
    detections: Sequence[Boxes],
    class_names: Sequence[str],
    path: Path | io.BytesIO,
    threshold: float = 0.4,
) -> None:
    """Draws a PNG of image pairs: true boxes on the left, detections with scores on the right.

    Args:
        images: Pixels of 0..255, `(H, W, 3)`.
        truths: The true boxes of each image.
        detections: The detections in each image; scores below `threshold` are not drawn.
        class_names: By label.
        path: The file to write.
        threshold: The lowest score of a drawn box.
    """
    columns = 2 if len(images) > 1 else 1
    rows = -(-len(images) // columns)
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    figure = Figure(figsize=(6.4 * columns, (3.2 * tallest + 0.3) * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for axes in grid.flat:
        axes.set_axis_off()
    for (left, right), image, truth, found in zip(grid, images, truths, detections, strict=False):
        _show(left, image, f"truth: {len(truth.boxes)}")
        for box in truth.boxes:
            _draw_box(left, box, _TRUTH)
        chosen = found.scores >= threshold
        _show(right, image, f"detected, score {threshold} and more: {int(chosen.sum())}")
        for box, label, score in zip(
            found.boxes[chosen], found.labels[chosen], found.scores[chosen], strict=True
        ):
            _draw_box(right, box, _color(label))
            if chosen.sum() <= 40:
                flag = {"facecolor": _color(label), "edgecolor": "none", "pad": 0.4}
                right.text(*box[:2], f"{score:.2f}", fontsize=4, color="white", va="top", bbox=flag)
    keys = [patches.Patch(color=_color(label), label=name) for label, name in enumerate(class_names)]
    if len(keys) <= len(_COLOURS):
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=120)


def _color(label: Any) -> str:
    return _COLOURS[int(label) % len(_COLOURS)]


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image.astype("uint8"))
    axes.set_title(title, fontsize=8)


def _draw_box(axes: Axes, box: np.ndarray, color: str) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1))


class Pictures(keras.callbacks.Callback):
    """Writes a sheet of predictions to TensorBoard every few epochs."""

    def __init__(self, logs: Path, draw: Callable[[io.BytesIO], None], every: int = 1) -> None:
        """`draw` writes the PNG of the current model."""
        super().__init__()
        self.folder, self.draw, self.every = logs, draw, every
        self.writer: Any = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Draw if due."""
        if (epoch + 1) % self.every and epoch + 1 != self.params.get("epochs"):
            return
        if self.writer is None:
            self.writer = tf.summary.create_file_writer(str(self.folder / "pictures"))
        png = io.BytesIO()
        self.draw(png)
        with self.writer.as_default():
            tf.summary.image("detections", tf.io.decode_png(png.getvalue())[None, ..., :3], step=epoch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
