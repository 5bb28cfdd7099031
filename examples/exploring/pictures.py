"""Pictures that the page offers or accepts."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from examples import common, data
from examples.common import UserError

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
COUNT = 8
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that Pillow may decode; some of its other decoders start programs."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in RGB, and its caption."""

    image: Image.Image
    caption: str = ""


def read_picture(path: str | Path) -> Picture:
    """The first frame of an image file in RGB, upright; a `UserError` explains why a file is rejected."""
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path.name} has {size / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB are supported")
    try:
        with warnings.catch_warnings():
            # Images that Pillow warns about exceed the limit of this module.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Picture(_decode(path), path.name)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path.name} is not an image: {', '.join(FORMATS)} are supported") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path.name} has too many pixels: {_pixel_limit()}") from error
    except Exception as error:  # any error of Pillow's decoders for damaged files
        raise UserError(f"{path.name} is damaged or incomplete: {common.first_line(error)}") from error


def _decode(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{path.name} has {width}x{height} pixels: {_pixel_limit()}")
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path.name} has more than 8 bits per channel, which is not supported")
        upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")


def _pixel_limit() -> str:
    return f"at most {MAX_PIXELS // 10**6} million are supported"


def read_folder(folder: str | Path) -> list[Picture]:
    """The first pictures of a folder, alternating between subfolders; other files raise an error."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--images: no such folder: {root}")
    files: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            files.setdefault(path.parent, []).append(path)
    turns = sorted((turn, path) for group in files.values() for turn, path in enumerate(group))
    if not turns:
        raise UserError(f"--images: {root} contains no images ({', '.join(SUFFIXES)})")
    return [read_picture(path) for _, path in turns[:COUNT]]


def training_pictures(model: Path, size: int) -> list[Picture]:
    """A few pictures of the test split named in the `results.json` next to the model."""
    results = read_results(model)
    arguments = results.get("arguments", {})
    if "data" not in arguments:
        raise UserError(f"no results.json beside {model} describes its images: pass a folder with --images")
    try:
        dataset = data.load(arguments["data"], size, arguments["seed"], arguments["data_dir"])
    except (UserError, common.RunError) as error:
        raise UserError(f"{error}; pass a folder of images with --images") from error
    shuffled = dataset.splits["test"].examples(np.array([0, 0], "int64")).take(COUNT)
    return [Picture(Image.fromarray(x.numpy()), f"label: {dataset.class_names[int(y)]}") for x, y in shuffled]


def read_results(model: Path) -> dict[str, Any]:
    """The `results.json` of `classify.py` next to the model; empty if there is none."""
    path = model.with_name("results.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} was not written by classify.py: {common.first_line(error)}") from error
