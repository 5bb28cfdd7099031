"""`--data voc:DIR`: a Pascal VOC folder of `Annotations`, `JPEGImages` and, optionally, `ImageSets/Main`.

Objects marked as difficult are treated like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.common import UserError
from examples.data import folders, voc
from examples.detection import splits


def load(folder: str, seed: int) -> splits.DetectionData:
    """The images of the lists train, val and test; missing val and test splits are held out from train.

    Without a list train, it contains every annotation that is not in another list. The classes are those of
    all boxes, in alphabetical order.
    """
    root = Path(folder).expanduser()
    if not (root / "Annotations").is_dir():
        raise UserError(f"not a Pascal VOC folder: {root} has no folder Annotations")
    stems = splits.fill(_read_lists(root), seed, str(root))
    annotations = {name: [_annotation(root, stem) for stem in part] for name, part in stems.items()}
    parsed = [annotation for part in annotations.values() for annotation in part]
    class_names = sorted({label for annotation in parsed for label in annotation.labels})
    files = _find_images(root / "JPEGImages")
    parts = {name: _split(root, stems[name], annotations[name], class_names, files) for name in stems}
    return splits.DetectionData(class_names, range(1, len(class_names) + 1), parts)


def _read_lists(root: Path) -> dict[str, list[str]]:
    paths = {name: root / "ImageSets" / "Main" / f"{name}.txt" for name in ("train", "val", "test")}
    lists = {name: _read_list(path) for name, path in paths.items() if path.is_file()}
    listed: dict[str, str] = {}
    for name, stems in lists.items():
        for stem in stems:
            if listed.setdefault(stem, name) != name:
                raise UserError(f"{paths[name]}: {stem} is in {listed[stem]}.txt as well")
    if "train" not in lists:
        found = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
        lists["train"] = [stem for stem in found if stem not in listed]
    return lists


def _read_list(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    stems = list(dict.fromkeys(line for line in lines if line))
    if not stems:
        raise UserError(f"{path} lists no images")
    return stems


def _annotation(root: Path, stem: str) -> voc.Annotation:
    path = _annotation_path(root, stem)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no annotation of image {stem}: {path}") from error
    return voc.parse(text, str(path))


def _annotation_path(root: Path, stem: str) -> Path:
    return root / "Annotations" / f"{stem}.xml"


def _find_images(folder: Path) -> dict[str, str]:
    """The image files by stem, because file names in annotations are often those of another machine."""
    if not folder.is_dir():
        raise UserError(f"not a Pascal VOC folder: {folder.parent} has no folder {folder.name}")
    return {
        path.stem: str(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in folders.SUFFIXES
    }


def _split(
    root: Path,
    stems: Sequence[str],
    annotations: Sequence[voc.Annotation],
    class_names: Sequence[str],
    files: Mapping[str, str],
) -> splits.FileSplit:
    numbers = {name: label for label, name in enumerate(class_names)}
    paths = [files.get(stem, str(root / "JPEGImages" / f"{stem}.jpg")) for stem in stems]
    truths = [
        splits.Truth(
            index,
            Path(path).name,
            annotation.height,
            annotation.width,
            annotation.boxes,
            np.array([numbers[label] for label in annotation.labels], "int32"),
            np.zeros(len(annotation.labels), bool),
        )
        for index, (path, annotation) in enumerate(zip(paths, annotations, strict=True))
    ]
    splits.check_sizes(truths, paths, [str(_annotation_path(root, stem)) for stem in stems])
    return splits.FileSplit(truths, sum(item.dropped for item in annotations), splits.on_cpu(paths))
