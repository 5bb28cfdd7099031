import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
# `examples` is not a part of the package. Scripts find it in their own folder, and tests through this path.
sys.path.insert(0, str(ROOT))

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
_NAMES = itertools.count()


def write_images(folder: Path, count: int, color: tuple[int, int, int], suffix: str = ".png") -> list[Path]:
    """Writes noisy images of one color and of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(next(_NAMES))
    paths = []
    for number in range(count):
        pixels = rng.normal(color, 30, (20 + number % 5, 24, 3)).clip(0, 255).astype("uint8")
        paths.append(folder / f"{number:03}{suffix}")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that creates a folder of images.

    It contains `counts` images per class, in each of `splits` or at the top level.
    """

    def make(counts: dict[str, int] | None = None, splits: tuple[str, ...] = ("",)) -> Path:
        root = tmp_path / "images"
        for split, (name, count) in itertools.product(splits, (counts or {"red": 20, "green": 20}).items()):
            write_images(root / split / name, count, COLOURS[name])
        return root

    return make
