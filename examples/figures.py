"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_das


def draw_confusion_matrix(confusion: np.ndarray, class_names: tuple[str, ...], path: Path) -> None:
    """Draws the confusion matrix as a PNG. Rows sum to 1; counts are shown for up to 20 classes."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = len(class_names) <= 20
    side = 3 + 0.6 * len(class_names) if few else 12
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    axes.set(
        xlabel="predicted", ylabel="true", title=f"test accuracy {confusion.trace() / confusion.sum():.3f}"
    )
    if few:
        axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
        axes.set_yticks(range(len(class_names)), class_names)
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.savefig(path, format="png", dpi=120)


def draw_gates(model: keras.Model, images: np.ndarray, labels: list[str], path: Path) -> None:
    """Draws a PNG with a row for each image: its gates, and the positions they sample for its center.

    `images` are pixels of 0..255, `(N, H, W, 3)`; `model` is a classifier of `classify.build_model`.
    """
    middle = [(size - 1) / 2 for size in images.shape[1:3]]
    figure = keras_das.visualize.plot_gates(model, images, point=middle, labels=labels)
    figure.savefig(path, format="png", dpi=120)
