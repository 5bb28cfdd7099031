"""`--data folder:PATH`: a folder of class folders, or of train, test and val folders of class folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from examples.common import UserError
from examples.data.pipeline import IN_MEMORY_BYTES, Dataset, FileSplit

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}
UNREAD_SUFFIXES = {".avif", ".heic", ".jp2", ".tif", ".tiff"}  # images that TensorFlow cannot decode
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
VAL_SHARE, TEST_SHARE = 0.15, 0.2

Files = dict[str, list[str]]
"""The image files of each class."""
Item = TypeVar("Item")


def load(path: str, size: int, seed: int, share: float = 1.0) -> Dataset:
    """The images below `path`; missing val and test splits are held out from train, class by class.

    `share` is the share of each class of train and val that is used.
    """
    if not 0 < share <= 1:
        raise UserError(f"--data-share must be above 0 and at most 1, not {share}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"data folder not found: {root}")
    found = _find_splits(root)
    class_names = list(found["train"])
    for name, held_out in (("test", TEST_SHARE), ("val", VAL_SHARE)):
        if name not in found:
            found["train"], found[name] = _hold_out(found["train"], held_out, seed)
    if share < 1:
        for name in ("train", "val"):
            _, found[name] = _hold_out(found[name], share, seed)
    splits = {name: _as_split(files, size) for name, files in found.items()}
    total = sum(split.count for split in splits.values())
    if total * size * size * 3 > IN_MEMORY_BYTES:
        return Dataset(class_names, splits)
    return Dataset(class_names, {name: split.load() for name, split in splits.items()})


def _find_splits(root: Path) -> dict[str, Files]:
    folders = {
        split: root / name
        for split, names in SPLIT_FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }
    if "train" not in folders:
        return {"train": _find_files(root)}
    found = {split: _find_files(folder) for split, folder in folders.items()}
    for split, files in found.items():
        _check_same_classes(folders["train"], found["train"], folders[split], files)
    return found


def _find_files(folder: Path) -> Files:
    classes = sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder} has {len(classes)} class folders; a classifier needs at least 2")
    files = {item.name: _images(item) for item in classes}
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        kinds = ", ".join(sorted(SUFFIXES))
        raise UserError(f"class folder {folder / empty[0]} contains no images ({kinds})")
    return files


def _images(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if not path.name.startswith(".")]
    if unread := sorted(path.name for path in files if path.suffix.lower() in UNREAD_SUFFIXES):
        print(
            f"{folder}: left out {len(unread)} images of other formats, such as {unread[0]}", file=sys.stderr
        )
    return sorted(str(path) for path in files if path.suffix.lower() in SUFFIXES)


def _check_same_classes(train_folder: Path, train: Files, folder: Path, files: Files) -> None:
    if list(train) == list(files):
        return
    lacking = sorted(train.keys() ^ files.keys())
    raise UserError(
        f"{train_folder} has {len(train)} classes and {folder} has {len(files)}; "
        f"not in both: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
    )


def _hold_out(files: Files, share: float, seed: int) -> tuple[Files, Files]:
    """Split every class at random into a larger and a smaller part, both non-empty."""
    rng = np.random.default_rng(seed)
    larger, smaller = {}, {}
    for name, paths in files.items():
        larger[name], smaller[name] = hold_out(paths, share, rng, f"class {name!r}")
    return larger, smaller


def hold_out(
    items: Sequence[Item], share: float, rng: np.random.Generator, source: str
) -> tuple[list[Item], list[Item]]:
    """Split `items` at random into the rest and a `share`, both non-empty and in the original order.

    `source` names the items in the error if there are too few.
    """
    if len(items) < 2:
        raise UserError(f"{source} has too few images for validation and test splits")
    count = min(len(items) - 1, max(1, round(share * len(items))))
    order = rng.permutation(len(items)).tolist()
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


def _as_split(files: Files, size: int) -> FileSplit:
    paths = [path for group in files.values() for path in group]
    labels = np.repeat(np.arange(len(files)), [len(group) for group in files.values()])
    return FileSplit(paths, labels.astype("int32"), size)
