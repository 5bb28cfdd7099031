"""`--data coco:ANNOTATIONS.json,IMAGES_DIR`: a COCO annotation file and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from examples.common import UserError
from examples.detection import splits

Parsed = TypeVar("Parsed")


class ImageEntry(NamedTuple):
    """An element of `images`."""

    id: int
    file_name: str
    height: int
    width: int


class BoxEntry(NamedTuple):
    """An element of `annotations`; the box is `(x1, y1, x2, y2)`."""

    image_id: int
    category_id: int
    box: tuple[float, float, float, float]
    crowd: bool


class CategoryEntry(NamedTuple):
    """An element of `categories`."""

    id: int
    name: str


def load(arguments: str, seed: int) -> splits.DetectionData:
    """The images of the annotation file; val and test are held out according to `seed`.

    The classes are the categories of the file, including those without boxes, in the order of their ids.
    """
    file, comma, folder = arguments.rpartition(",")
    if not (file and comma and folder):
        raise UserError(f"--data coco:ANNOTATIONS.json,IMAGES_DIR needs both, not {arguments!r}")
    path, root = Path(file).expanduser(), Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"folder of images not found: {root}")
    content = _read(path)
    images = _parse(path, content, "images", _image)
    categories = sorted(_parse(path, content, "categories", _category))
    _check_unique(path, "images", images)
    _check_unique(path, "categories", categories)
    boxes = _by_image(path, images, categories, _parse(path, content, "annotations", _box))
    parts = {
        name: _split(path, root, part, boxes, [category.id for category in categories])
        for name, part in splits.fill({"train": images}, seed, str(path)).items()
    }
    return splits.DetectionData(
        [category.name for category in categories], [category.id for category in categories], parts
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read annotations: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"cannot read annotations: {path}: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list {key!r}: it is not a COCO file of objects")
    return content


def _parse(path: Path, content: dict[str, Any], key: str, parse: Callable[[Any], Parsed]) -> list[Parsed]:
    parsed = []
    for number, entry in enumerate(content[key]):
        try:
            parsed.append(parse(entry))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"cannot read annotations: {path}: {key}[{number}]: {reason}") from error
    return parsed


def _image(entry: Any) -> ImageEntry:
    image = ImageEntry(int(entry["id"]), str(entry["file_name"]), int(entry["height"]), int(entry["width"]))
    if image.width < 1 or image.height < 1:
        raise ValueError(f"the size of {image.file_name} is {image.width} x {image.height}")
    return image


def _category(entry: Any) -> CategoryEntry:
    return CategoryEntry(int(entry["id"]), str(entry["name"]))


def _box(entry: Any) -> BoxEntry:
    box = [float(value) for value in entry["bbox"]]
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f"bbox must be x, y, width and height, not {entry['bbox']}")
    x, y, width, height = box
    corners = (x, y, x + width, y + height)
    return BoxEntry(int(entry["image_id"]), int(entry["category_id"]), corners, bool(entry.get("iscrowd", 0)))


def _check_unique(path: Path, key: str, entries: Iterable[ImageEntry | CategoryEntry]) -> None:
    seen: set[int] = set()
    for entry in entries:
        if entry.id in seen:
            raise UserError(f"{path}: two of {key} have the id {entry.id}")
        seen.add(entry.id)


def _by_image(
    path: Path, images: Sequence[ImageEntry], categories: Sequence[CategoryEntry], boxes: Sequence[BoxEntry]
) -> dict[int, list[BoxEntry]]:
    """The boxes of each image, by its id."""
    names = {image.id: image.file_name for image in images}
    known = {category.id for category in categories}
    found: dict[int, list[BoxEntry]] = {image.id: [] for image in images}
    for box in boxes:
        if box.image_id not in found:
            raise UserError(f"{path}: there is a box for image {box.image_id}, which is not among the images")
        if box.category_id not in known:
            raise UserError(
                f"{path}: a box of {names[box.image_id]} has the category id {box.category_id}, "
                "which is not among the categories"
            )
        found[box.image_id].append(box)
    return found


def _split(
    path: Path,
    root: Path,
    images: Sequence[ImageEntry],
    boxes: Mapping[int, Sequence[BoxEntry]],
    category_ids: Sequence[int],
) -> splits.FileSplit:
    truths, dropped = [], 0
    for image in images:
        own = boxes[image.id]
        fields, lost = splits.clean(
            np.array([box.box for box in own]),
            np.searchsorted(category_ids, [box.category_id for box in own]),
            np.array([box.crowd for box in own]),
            image.height,
            image.width,
        )
        truths.append(splits.Truth(image.id, image.file_name, image.height, image.width, **fields))
        dropped += lost
    paths = [str(root / image.file_name) for image in images]
    splits.check_sizes(truths, paths, [str(path)] * len(paths))
    return splits.FileSplit(truths, dropped, splits.on_cpu(paths))
