"""`--data trees`: overlapping tiles of the aerial photographs, with the tree crowns in them.

A tile is within one cell of `examples.data.trees`, and each cell belongs to one split: no pixel is in two
splits.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from examples.data import aerial, trees, voc
from examples.detection import splits

CLASS_NAMES = ("crown",)
TILE = 256
"""The side of a tile in pixels."""
STRIDE = 128
"""The largest stride of tiles, which are spread evenly over a cell and reach its borders."""
MIN_KEPT = 0.5
"""A crown cut by the border of a tile counts if this share of its box is inside."""


def load() -> splits.DetectionData:
    """The tiles of all photographs; `dropped` counts crowns with less than half of their box in a tile."""
    photographs = aerial.load()
    parts = {name: _cut(photographs, name) for name in ("train", "val", "test")}
    return splits.DetectionData(CLASS_NAMES, (1,), parts)


def tiles(width: int, height: int, split: str) -> list[tuple[int, int, int, int]]:
    """The tiles `(x1, y1, x2, y2)` of a photograph that belong to `split`."""
    return [
        (x, y, x + TILE, y + TILE)
        for cell in trees.cells(width, height)
        if cell.split == split
        for y, x in itertools.product(_starts(*cell.bounds[1::2]), _starts(*cell.bounds[0::2]))
    ]


def _starts(low: int, high: int) -> list[int]:
    """The starts of tiles that cover the pixels from `low` to `high`."""
    room = high - low - TILE
    return (low + np.linspace(0, room, math.ceil(room / STRIDE) + 1).round().astype(int)).tolist()


def _cut(photographs: list[aerial.Photograph], split: str) -> splits.ArraySplit:
    truths: list[splits.Truth] = []
    images, dropped = [], 0
    for photograph in photographs:
        annotation = photograph.annotation
        for number, bounds in enumerate(tiles(annotation.width, annotation.height, split)):
            boxes, lost = crowns(annotation.boxes, bounds)
            name = f"tile {number} of {photograph.name}"
            labels, crowd = np.zeros(len(boxes), "int32"), np.zeros(len(boxes), bool)
            truths.append(splits.Truth(len(truths), name, TILE, TILE, boxes, labels, crowd))
            images.append(photograph.pixels[bounds[1] : bounds[3], bounds[0] : bounds[2]])
            dropped += lost
    return splits.ArraySplit(truths, dropped, splits.on_cpu(np.stack(images)))


def crowns(boxes: np.ndarray, bounds: tuple[int, int, int, int]) -> tuple[np.ndarray, int]:
    """The parts of `boxes` in the tile `bounds`, in pixels of the tile, and the number of dropped boxes."""
    inside = voc.clip(boxes, bounds)
    share = voc.area(inside) / voc.area(boxes)
    origin = np.array(bounds[:2] * 2, "float32")
    return inside[share >= MIN_KEPT] - origin, int(np.sum((share > 0) & (share < MIN_KEPT)))
