"""Data for object detection: `load` reads `--data` as splits of images with true boxes.

The module also re-exports the other names that training needs.
"""

from __future__ import annotations

from examples.common import UserError
from examples.detection import coco_file, tfds_objects, tiles, voc_folder
from examples.detection.batches import evaluation_batches, resize_scale, training_batches
from examples.detection.splits import DetectionData, Split, Truth

__all__ = [
    "DetectionData",
    "Split",
    "Truth",
    "evaluation_batches",
    "load",
    "resize_scale",
    "training_batches",
]


def load(spec: str, seed: int, data_dir: str | None = None) -> DetectionData:
    """Loads the data `spec`.

    Args:
        spec: `trees`, `voc:DIR`, `coco:ANNOTATIONS.json,IMAGES_DIR` or `tfds:NAME`.
        seed: Selects the images that are held out if there is no val or test split.
        data_dir: Folder of TensorFlow Datasets' files.

    Returns:
        Classes and splits. Boxes are clipped to their images; each split counts the dropped ones.

    Raises:
        UserError: If `spec` is invalid, or its data is incomplete or inconsistent.
        RunError: If an image cannot be read.
    """
    data = _read(spec, seed, data_dir)
    for name, split in data.splits.items():
        if not split.truths:
            raise UserError(f"--data {spec}: there are no images in the split {name}")
    if all(truth.crowd.all() for truth in data.splits["train"].truths):
        raise UserError(f"--data {spec}: no image of the split train has a box")
    return data


def _read(spec: str, seed: int, data_dir: str | None) -> DetectionData:
    kind, _, rest = spec.partition(":")
    if spec == "trees":
        return tiles.load()
    if kind == "voc" and rest:
        return voc_folder.load(rest, seed)
    if kind == "coco" and rest:
        return coco_file.load(rest, seed)
    if kind == "tfds" and rest:
        return tfds_objects.load(rest, data_dir)
    raise UserError(
        f"--data must be trees, voc:DIR, coco:ANNOTATIONS.json,IMAGES_DIR or tfds:NAME, not {spec!r}"
    )
