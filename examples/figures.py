"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_das


def draw_confusion_matrix(confusion: np.ndarray, class_names: tuple[str, ...], path: Path) -> None:
    """A PNG of the confusion matrix; rows add up to 1, counts are written in while there is room."""
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
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    figure.savefig(path, format="png", dpi=120)


def draw_gates(model: keras.Model, images: np.ndarray, labels: list[str], path: Path) -> None:
    """A PNG with a row for each image: where each stage reads around its middle, and its gate.

    `images` are pixels of 0..255, `(N, H, W, 3)`; `model` is a classifier of `classify.build_model`.
    """
    inputs = gate_inputs(model, images)
    figure = Figure(figsize=(2 * (1 + len(inputs)), 2.1 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(inputs), squeeze=False)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        grid[row, 0].imshow(image.astype("uint8"))
        grid[row, 0].set_ylabel(label)
    for column, (gate, x) in enumerate(inputs, start=1):
        attention = _to_numpy(gate.gate(x)).mean(axis=-1)
        points, strength = _sampled_points(gate, x, images.shape[1:3])
        for row, axes in enumerate(grid[:, column]):
            extent = (0, images.shape[2], images.shape[1], 0)
            axes.imshow(attention[row], cmap="viridis", extent=extent, interpolation="bilinear")
            axes.scatter(
                points[row, :, 1], points[row, :, 0], s=60 * strength[row], c="white", edgecolors="red"
            )
            axes.set(xlim=extent[:2], ylim=extent[2:])
        height, width = attention.shape[1:]
        grid[0, column].set_title(f"{gate.name}\n{height}x{width}")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, format="png", dpi=120)


def gate_inputs(model: keras.Model, images: np.ndarray) -> list[tuple[keras_das.DASLayer, keras.KerasTensor]]:
    """The gates of a classifier of `classify.build_model`, each with the feature maps that it gets."""
    features = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    gates = [layer for layer in features.layers if isinstance(layer, keras_das.DASLayer)]
    if not gates:
        return []
    before = model.layers[model.layers.index(features) - 1]
    prepared = keras.Model(model.input, before.output)(images)
    maps = keras.Model(features.input, [gate.input for gate in gates])(prepared)
    return list(zip(gates, keras.tree.flatten(maps), strict=True))


def _sampled_points(
    gate: keras_das.DASLayer, x: np.ndarray, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the middle of a feature map reads, as `(N, taps, (y, x))` in image pixels, and the masks."""
    offsets, mask = gate.predict_offsets(x)
    offsets = _to_numpy(offsets)
    count, height, width = offsets.shape[:3]
    row, column = height // 2, width // 2
    size, rate = np.array(gate.kernel_size), np.array(gate.dilation_rate)
    taps = np.stack(np.indices(size), axis=-1).reshape(-1, 2) * rate - (size - 1) * rate // 2
    # The first offset group's, which come first.
    moved = offsets[:, row, column, : 2 * len(taps)].reshape(count, len(taps), 2)
    stride = np.array([image_size[0] / height, image_size[1] / width])
    points = (np.array([row, column]) + taps + moved + 0.5) * stride
    if mask is None:
        return points, np.ones((count, len(taps)))
    return points, _to_numpy(mask)[:, row, column, : len(taps)]


def _to_numpy(x: keras.KerasTensor) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))
