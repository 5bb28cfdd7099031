"""Image classification data for the examples: `load` reads `--data` as splits of labelled images."""

from __future__ import annotations

from examples.common import UserError
from examples.data import folders, tfds_source, trees
from examples.data.pipeline import ArraySplit, Dataset


def load(spec: str, image_size: int, seed: int, data_dir: str | None = None, share: float = 1.0) -> Dataset:
    """Load `spec`, one of `trees`, `folder:PATH` and `tfds:NAME`, as square images of `image_size`.

    `seed` selects the images that are held out if the source has no validation or test split. `data_dir` is
    the folder of TensorFlow Datasets' files. `share` is the share of a folder's training and validation
    images to use.
    """
    kind, _, name = spec.partition(":")
    if share != 1 and kind != "folder":
        raise UserError(f"--data-share requires --data folder:PATH, not {spec!r}")
    if spec == "trees":
        splits = {split: ArraySplit(*arrays) for split, arrays in trees.load(image_size).items()}
        return Dataset(trees.CLASS_NAMES, splits)
    if kind == "folder" and name:
        return folders.load(name, image_size, seed, share)
    if kind == "tfds" and name:
        return tfds_source.load(name, image_size, data_dir)
    raise UserError(f"--data must be trees, folder:PATH or tfds:NAME, not {spec!r}")
