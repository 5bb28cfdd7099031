"""Images with true boxes: their metadata and access to their pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from PIL import Image

from examples.common import RunError, UserError, first_line
from examples.data import folders, pipeline, voc
from examples.data.folders import Item

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
"""What both Pillow, which is asked for the size, and TensorFlow can read."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """The metadata of one image."""

    image_id: int
    """Unique in the split: the COCO id if there is one, otherwise the index."""
    name: str
    """Name in messages: `cat.jpg`, or `tile 3 of OSBS_029`."""
    height: int
    width: int
    boxes: np.ndarray
    """Float32 `(n, 4)`, `(x1, y1, x2, y2)` in pixels, inside the image and with positive area."""
    labels: np.ndarray
    """Int32 `(n,)`, below the number of classes."""
    crowd: np.ndarray
    """Bool `(n,)`, COCO's `iscrowd`: a region of many objects, ignored in training."""


class Split(Protocol):
    """A fixed sequence of images, each with its truth."""

    @property
    def truths(self) -> Sequence[Truth]:
        """For every image, including those without boxes."""

    @property
    def dropped(self) -> int:
        """The number of boxes that were dropped because they are degenerate or outside the image."""

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """The image of `truths[index]` in its original size, uint8 `(height, width, 3)`, for `tf.data`."""


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """The classes, by label, and the splits train, val and test."""

    class_names: Sequence[str]
    category_ids: Sequence[int]
    """The COCO id of each class, or 1, 2, ... if the source has none."""
    splits: Mapping[str, Split]


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Images of one size in memory: uint8 `(n, height, width, 3)`, created by `on_cpu`."""

    truths: Sequence[Truth]
    dropped: int
    images: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return self.images[index]


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """Encoded images in memory: strings `(n,)`, created by `on_cpu`."""

    truths: Sequence[Truth]
    dropped: int
    encoded: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return pipeline.decode_image(self.encoded[index])


@dataclasses.dataclass(frozen=True)
class FileSplit:
    """Image files that are read on demand: paths `(n,)`, created by `on_cpu`."""

    truths: Sequence[Truth]
    dropped: int
    paths: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return pipeline.decode_image(tf.io.read_file(self.paths[index]))

    def check(self) -> None:
        """Decode every image without keeping it, to name the one that stopped a run."""
        pipeline.check_files([path.decode() for path in self.paths.numpy()])


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a split."""

    split: Split
    indices: Sequence[int]

    @property
    def truths(self) -> Sequence[Truth]:
        """The truths of the selected images."""
        return [self.split.truths[index] for index in self.indices]

    @property
    def dropped(self) -> int:
        """The same as in the whole split."""
        return 0

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return self.split.image(on_cpu(self.indices, tf.int64)[index])


def on_cpu(values: Any, dtype: tf.DType | None = None) -> tf.Tensor:
    """A tensor in the memory of the CPU, where `tf.data` reads it."""
    with tf.device("cpu"):
        return tf.constant(values, dtype)


def clean(
    boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, height: int, width: int
) -> tuple[dict[str, np.ndarray], int]:
    """The last three fields of a `Truth`, and the number of dropped boxes.

    Boxes are clipped to the image. Boxes without area, degenerate or outside, are dropped.
    """
    boxes = voc.clip(np.reshape(boxes, (-1, 4)).astype("float32"), (0, 0, width, height))
    keep = voc.area(boxes) > 0
    fields = {"boxes": boxes[keep], "labels": labels.astype("int32")[keep], "crowd": crowd.astype(bool)[keep]}
    return fields, int(np.sum(~keep))


def fill(found: Mapping[str, Sequence[Item]], seed: int, source: str) -> dict[str, Sequence[Item]]:
    """The images of train, val and test; missing val and test splits are held out from train.

    `found` contains at least train. `source` is named in the error if there are too few images.
    """
    splits = dict(found)
    for name, share in (("test", folders.TEST_SHARE), ("val", folders.VAL_SHARE)):
        if name not in splits:
            rng = np.random.default_rng(seed)
            splits["train"], splits[name] = folders.hold_out(splits["train"], share, rng, source)
    return {name: splits[name] for name in ("train", "val", "test")}


def check_sizes(truths: Sequence[Truth], paths: Sequence[str], annotations: Sequence[str]) -> None:
    """Check that every image file has the size of its truth, without decoding its pixels.

    Args:
        truths: The truths of the images.
        paths: The paths of the image files.
        annotations: The files that contain the truths, for messages.

    Raises:
        UserError: If a file is missing or its size differs.
        RunError: If TensorFlow cannot read a file.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_size, truths, paths, annotations):
            pass


def _check_size(truth: Truth, path: str, annotation: str) -> None:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except FileNotFoundError as error:
        raise UserError(f"{annotation} refers to a missing image: {path}") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read image: {path}: {first_line(error)}") from error
    if (width, height) != (truth.width, truth.height):
        raise UserError(
            f"{path} is {width} x {height} pixels, {annotation} says {truth.width} x {truth.height}"
        )
