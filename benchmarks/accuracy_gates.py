"""Describes trained gates, and counts the multiply-adds of attention."""

from typing import Any

import keras
import keras_das
import numpy as np
from scipy import stats

import attention
from accuracy_tasks import Split

Tensor = Any
_IMAGES = 256  # images on which gates are described
_CAM_IMAGES = 64  # Grad-CAM needs a backward pass for each


def describe(model: keras.Model, images: np.ndarray, boxes: np.ndarray | None) -> list[dict[str, Any]]:
    """Describes each gate on some of the test images, in the order in which the gates run."""
    chosen = np.random.default_rng(0).permutation(len(images))[:_IMAGES]
    found = keras_das.visualize.gate_inputs(model, images[chosen].astype("float32"))
    inside = None if boxes is None else (boxes[chosen], images.shape[1:3])
    gates = keras_das.DASLayer.call  # controls may use the layers of a gate differently
    return [_describe_gate(gate, x, inside) for gate, x in found if type(gate).call is gates]


def _describe_gate(gate: keras_das.DASLayer, x: Tensor, inside: Any) -> dict[str, Any]:
    """How far the taps move, how the values of the gate vary, and whether they locate the object."""
    offsets, _ = gate.predict_offsets(x)
    offsets, values = np.asarray(offsets, "float64"), np.asarray(gate.gate(x), "float64")
    moved = offsets.reshape(*offsets.shape[:3], -1, 2)
    by_place = values.mean(-1)
    described = {
        "name": gate.name,
        "map": list(values.shape[1:3]),
        "offset_rms_pixels": float(np.sqrt((moved**2).sum(-1).mean())),
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "spatial_deviation": float(by_place.std(axis=(1, 2)).mean()),
    }
    if inside is not None:
        described["auc"] = area_under_curve(by_place, *inside)
    return described


def cam_area(model: keras.Model, layer: str, images: np.ndarray, test: Split) -> float:
    """How well Grad-CAM for the true class separates the pixels in a box from the others."""
    chosen = np.random.default_rng(0).permutation(len(images))[:_CAM_IMAGES]
    maps = [
        keras_das.visualize.grad_cam(model, images[i].astype("float32"), layer, int(test.labels[i]))
        for i in chosen
    ]
    return area_under_curve(np.stack(maps), test.boxes[chosen], images.shape[1:3])


def area_under_curve(maps: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> float:
    """Area under the ROC curve of the maps' values as detectors of "this pixel lies in a box".

    Args:
        maps: `(N, h, w)`, feature maps over whole images.
        boxes: `(N, boxes, 4)`: top, left, bottom, right in pixels of the images.
        size: Rows and columns of the images.
    """
    rows, columns = (
        (np.arange(count) + 0.5) * whole / count for count, whole in zip(maps.shape[1:], size, strict=True)
    )
    y, x = rows[None, None, :, None], columns[None, None, None, :]
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)[..., None, None]
    inside = ((y >= top) & (y < bottom) & (x >= left) & (x < right)).any(1).ravel()
    ranks = stats.rankdata(maps.ravel())
    count = int(inside.sum())
    return float((ranks[inside].sum() - count * (count + 1) / 2) / (count * (inside.size - count)))


def multiply_adds(model: keras.Model) -> int:
    """Multiply-adds for one image, from the weights and outputs of layers, without pooling and products."""
    return sum(_multiply_adds(layer, layer.output.shape[1:-1]) for layer in model.layers if layer.weights)


def _multiply_adds(layer: keras.layers.Layer, size: tuple[int, ...]) -> int:
    pixels = int(np.prod(size))
    if isinstance(layer, keras_das.DeformableConv2D):
        sampled = layer.taps * layer.offset_kernel.shape[2] * 5  # four corners, and the mask
        return pixels * (int(np.prod(layer.kernel.shape)) + int(np.prod(layer.offset_kernel.shape)) + sampled)
    if isinstance(layer, attention.SE | attention.CBAM):
        dense = 2 * int(np.prod(layer._layers[0].kernel.shape))
        spatial = (
            pixels * int(np.prod(layer.spatial.kernel.shape)) if isinstance(layer, attention.CBAM) else 0
        )
        return dense * (2 if spatial else 1) + spatial
    if isinstance(layer, keras_das.DASLayer):
        inner = layer._flatten_layers(include_self=False, recursive=False)
        return sum(_multiply_adds(part, size) for part in inner)
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense | keras.layers.DepthwiseConv2D):
        return pixels * int(np.prod(layer.kernel.shape))
    return 0
