"""Clutter: a digit among fragments of other digits, after the cluttered digits of Mnih et al., 2014.

The digits are those of scikit-learn (1,797 of 8x8 pixels). Training and test images use different digits.

    Reference: Mnih et al., 2014, arXiv 1406.6247, section 4.1.2
"""

import dataclasses

import numpy as np
from scipy import ndimage

SIZE = 64
FRAGMENT = (0.3, 0.5)  # sides of a fragment relative to those of its digit
_TURN = 30.0  # degrees


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with their digits and the boxes around them."""

    images: np.ndarray  # (N, 64, 64, 3), uint8
    labels: np.ndarray  # (N,)
    boxes: np.ndarray  # (N, 1, 4): top, left, bottom, right in pixels


def load(
    train: int,
    test: int,
    fragments: int,
    scale: tuple[float, float],
    fragment: tuple[float, float] = FRAGMENT,
) -> tuple[Images, Images]:
    """Returns the same training and test images at every call.

    Args:
        train: Number of training images.
        test: Number of test images.
        fragments: Fragments in each image.
        scale: Smallest and largest scale of the digits, relative to their 8x8 pixels.
        fragment: Smallest and largest sides of a fragment, relative to those of its digit.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    split = len(order) * 2 // 3
    parts = ((order[:split], train, 1), (order[split:], test, 2))
    return tuple(
        _draw(digits.images[chosen] / 16, digits.target[chosen], count, fragments, scale, fragment, seed)
        for chosen, count, seed in parts
    )


def _draw(digits, targets, count, fragments, scale, fragment, seed) -> Images:
    rng = np.random.default_rng(seed)
    images = np.zeros((count, SIZE, SIZE))
    labels, boxes = np.zeros(count, "int64"), np.zeros((count, 1, 4))
    for index in range(count):
        for digit in digits[rng.integers(len(digits), size=fragments)]:
            _place(images[index], _cut(_transform(digit, scale, rng), fragment, rng), rng)
        chosen = rng.integers(len(digits))
        labels[index] = targets[chosen]
        boxes[index, 0] = _place(images[index], _transform(digits[chosen], scale, rng), rng)
    gray = (255 * images).astype("uint8")
    return Images(np.repeat(gray[..., None], 3, axis=-1), labels, boxes)


def _transform(digit: np.ndarray, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The rotated and scaled digit, without empty rows and columns."""
    factor, angle = rng.uniform(*scale), np.deg2rad(rng.uniform(-_TURN, _TURN))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
    side = int(np.ceil(8 * 1.5 * factor))
    offset = np.array([3.5, 3.5]) - turn @ np.full(2, (side - 1) / 2)
    enlarged = ndimage.affine_transform(digit, turn, offset, (side, side), order=1)
    rows, columns = (np.flatnonzero(enlarged.max(axis) > 0.1) for axis in (1, 0))
    return enlarged[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _cut(patch: np.ndarray, fragment: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random part of a digit."""
    size = np.ceil(rng.uniform(*fragment, size=2) * patch.shape).astype(int)
    top, left = (rng.integers(whole - part + 1) for whole, part in zip(patch.shape, size, strict=True))
    return patch[top : top + size[0], left : left + size[1]]


def _place(image: np.ndarray, patch: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws the patch at a random position, brighter pixels over darker ones, and returns its box."""
    height, width = patch.shape
    top, left = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
    region = image[top : top + height, left : left + width]
    np.maximum(region, patch, out=region)
    return top, left, top + height, left + width
