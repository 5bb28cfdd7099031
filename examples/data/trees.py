"""`--data trees`: patches of tree crowns and background from the aerial photographs.

Each photograph is tiled into cells, and each cell belongs to one split. Patches do not cross cells, so no
pixel is in two splits.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from PIL import Image

from examples.data import aerial, voc

CLASS_NAMES = ("background", "crown")
CELL = 400
"""The approximate side of a cell in pixels: the largest patches are half as wide."""
SPLIT_OF_CELL = ("train", "test", "train", "val", "train")
CONTEXT = 1.3
"""The side of a patch relative to the longer side of its crown."""
MIN_SIDE = 32
MIN_KEPT = 0.7
"""A crown cut by the border of its cell counts if this share of its box is inside."""
MAX_OVERLAP = 0.02
"""The share of a background patch that crown boxes may cover."""
MARGIN = 4
"""Pixels added to each box when selecting background, since crowns extend beyond hand-drawn boxes."""
MAX_SHARED = 0.4
"""The largest overlap of two background patches, as a share of the smaller one."""
TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Cell:
    """A rectangle `(x1, y1, x2, y2)` of a photograph, in pixels, and the split that owns it."""

    split: str
    bounds: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Patch:
    """A square `(x1, y1, x2, y2)` of one photograph, and its class."""

    split: str
    photograph: int
    bounds: tuple[int, int, int, int]
    label: int


def load(size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (uint8, `(n, size, size, 3)`) and labels (int32) of the splits train, val and test."""
    photographs = aerial.load()
    patches = find_patches(photographs)
    return {
        split: _cut(photographs, [patch for patch in patches if patch.split == split], size)
        for split in ("train", "val", "test")
    }


def cells(width: int, height: int) -> list[Cell]:
    """Tile a photograph into cells of about `CELL` pixels a side and assign them to splits."""
    x = np.linspace(0, width, max(1, round(width / CELL)) + 1).astype(int).tolist()
    y = np.linspace(0, height, max(1, round(height / CELL)) + 1).astype(int).tolist()
    return [
        # Shifted by two columns per row, so that each row and column contributes to all splits.
        Cell(SPLIT_OF_CELL[(2 * row + column) % len(SPLIT_OF_CELL)], (left, top, right, bottom))
        for row, (top, bottom) in enumerate(itertools.pairwise(y))
        for column, (left, right) in enumerate(itertools.pairwise(x))
    ]


def find_patches(photographs: list[aerial.Photograph], seed: int = 0) -> list[Patch]:
    """Every crown that fits, and as many background patches of similar sizes as fit into each cell.

    Background is matched to the crowns by photograph, so that neither color cast nor sharpness reveals the
    class.
    """
    rng = np.random.default_rng(seed)
    patches = []
    for index, photograph in enumerate(photographs):
        height, width = photograph.pixels.shape[:2]
        tiles = cells(width, height)
        crowns = [patch for cell in tiles for patch in _crowns(photograph.annotation.boxes, cell, index)]
        covered = _covered(photograph)
        for split in dict.fromkeys(cell.split for cell in tiles):
            sides = [_side(patch.bounds) for patch in crowns if patch.split == split]
            owned = [cell for cell in tiles if cell.split == split]
            patches += _background(sides, owned, covered, index, rng)
        patches += crowns
    return patches


def _side(bounds: tuple[int, int, int, int]) -> int:
    return bounds[2] - bounds[0]


def _crowns(boxes: np.ndarray, cell: Cell, photograph: int) -> list[Patch]:
    inside = voc.clip(boxes, cell.bounds)
    found = []
    for box in inside[voc.area(inside) >= MIN_KEPT * voc.area(boxes)]:
        side = max(MIN_SIDE, round(CONTEXT * float(np.max(box[2:] - box[:2]))))
        bounds = _place((box[:2] + box[2:]) / 2, side, cell.bounds)
        if bounds:
            found.append(Patch(cell.split, photograph, bounds, CLASS_NAMES.index("crown")))
    return found


def _place(
    center: np.ndarray, side: int, bounds: tuple[int, int, int, int]
) -> tuple[int, int, int, int] | None:
    """The square around `center`, shifted into `bounds`, or `None` if it does not fit."""
    low, high = np.array(bounds[:2]), np.array(bounds[2:]) - side
    if (high < low).any():
        return None
    x, y = np.clip(np.round(center - side / 2).astype(int), low, high).tolist()
    return x, y, x + side, y + side


def _covered(photograph: aerial.Photograph) -> np.ndarray:
    """A summed-area table of the pixels under crown boxes, `MARGIN` included."""
    mask = np.zeros(photograph.pixels.shape[:2], bool)
    for x1, y1, x2, y2 in photograph.annotation.boxes.round().astype(int):
        mask[max(0, y1 - MARGIN) : y2 + MARGIN, max(0, x1 - MARGIN) : x2 + MARGIN] = True
    return np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def _background(
    sides: list[int], owned: list[Cell], covered: np.ndarray, photograph: int, rng: np.random.Generator
) -> list[Patch]:
    """Up to one patch for each of `sides`, without crowns and with little overlap."""
    found = np.zeros((0, 4), int)
    for wanted in sorted(sides, reverse=True):
        for side in (wanted, max(MIN_SIDE, wanted // 2)):  # gaps between crowns are narrow
            squares = _random_squares(side, owned, rng)
            squares = squares[_is_free(squares, covered)]
            squares = squares[~_crowds(squares, found)][:1]
            found = np.concatenate([found, squares])
            if len(squares):
                break
    label = CLASS_NAMES.index("background")
    return [Patch(owned[0].split, photograph, tuple(bounds), label) for bounds in found.tolist()]


def _random_squares(side: int, owned: list[Cell], rng: np.random.Generator) -> np.ndarray:
    """`TRIES` squares `(x1, y1, x2, y2)`, each within a cell that is large enough."""
    cells = np.array([cell.bounds for cell in owned])
    cells = cells[(cells[:, 2:] - cells[:, :2] >= side).all(axis=1)]
    if not len(cells):
        return np.zeros((0, 4), int)
    cells = cells[rng.integers(len(cells), size=TRIES)]
    corners = rng.integers(cells[:, :2], cells[:, 2:] - side, endpoint=True)
    return np.concatenate([corners, corners + side], axis=1)


def _is_free(squares: np.ndarray, covered: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = squares.T
    pixels = covered[y2, x2] - covered[y1, x2] - covered[y2, x1] + covered[y1, x1]
    return pixels <= MAX_OVERLAP * (x2 - x1) * (y2 - y1)


def _crowds(squares: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Which of `squares` overlap one of `found` by more than `MAX_SHARED`."""
    low = np.maximum(squares[:, None, :2], found[None, :, :2])
    high = np.minimum(squares[:, None, 2:], found[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(axis=-1)
    smaller = np.minimum(squares[:, None, 2] - squares[:, None, 0], found[None, :, 2] - found[None, :, 0])
    return (shared > MAX_SHARED * smaller**2).any(axis=1)


def _cut(
    photographs: list[aerial.Photograph], patches: list[Patch], size: int
) -> tuple[np.ndarray, np.ndarray]:
    images = [Image.fromarray(photograph.pixels) for photograph in photographs]
    # Crop first, because `resize(box=...)` reads pixels outside the box. Pillow's filters scale with the
    # reduction, so shrunk patches have no aliasing.
    cut = [
        images[patch.photograph].crop(patch.bounds).resize((size, size), Image.Resampling.BICUBIC)
        for patch in patches
    ]
    labels = np.array([patch.label for patch in patches], "int32")
    return np.stack([np.asarray(image) for image in cut]), labels
