"""Images with true boxes: what is known of them, and where their pixels are."""

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
    """What is known of one image."""

    image_id: int
    """Unique in the split: COCO's own where there is one, else the index."""
    name: str
    """For messages: `cat.jpg`, or `tile 3 of OSBS_029`."""
    height: int
    width: int
    boxes: np.ndarray
    """Float32 `(n, 4)`, `(x1, y1, x2, y2)` in pixels, inside the image and all of positive area."""
    labels: np.ndarray
    """Int32 `(n,)`, below the number of classes."""
    crowd: np.ndarray
    """Bool `(n,)`, COCO's `iscrowd`: a region of many objects. Training leaves these out."""


class Split(Protocol):
    """Images in a fixed number and order, each with its truth."""

    @property
    def truths(self) -> Sequence[Truth]:
        """Of every image, those without boxes included."""

    @property
    def dropped(self) -> int:
        """How many boxes of the source are not among the truths: degenerate ones and those outside."""

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """The image of `truths[index]` in its own size, uint8 `(height, width, 3)`; `tf.data` can map it."""


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """The classes, by label, and the splits train, val and test."""

    class_names: Sequence[str]
    category_ids: Sequence[int]
    """COCO's id of each class, or 1 and up where the source has none."""
    splits: Mapping[str, Split]


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Images of one size in memory: uint8 `(n, height, width, 3)`, made by `on_cpu`."""

    truths: Sequence[Truth]
    dropped: int
    images: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return self.images[index]


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """Images in memory as files hold them: strings `(n,)`, made by `on_cpu`."""

    truths: Sequence[Truth]
    dropped: int
    encoded: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return pipeline.decode_image(self.encoded[index])


@dataclasses.dataclass(frozen=True)
class FileSplit:
    """Image files that are read as they are needed: paths `(n,)`, made by `on_cpu`."""

    truths: Sequence[Truth]
    dropped: int
    paths: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return pipeline.decode_image(tf.io.read_file(self.paths[index]))

    def check(self) -> None:
        """Decode every image and keep none, to name the one that stopped a run."""
        pipeline.check_files([path.decode() for path in self.paths.numpy()])


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a split."""

    split: Split
    indices: Sequence[int]

    @property
    def truths(self) -> Sequence[Truth]:
        """Of the chosen images."""
        return [self.split.truths[index] for index in self.indices]

    @property
    def dropped(self) -> int:
        """Nothing more than in the whole split."""
        return 0

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        return self.split.image(on_cpu(self.indices, tf.int64)[index])


def on_cpu(values: Any, dtype: tf.DType | None = None) -> tf.Tensor:
    """A tensor in the CPU's memory, where `tf.data` reads."""
    with tf.device("cpu"):
        return tf.constant(values, dtype)


def clean(
    boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, height: int, width: int
) -> tuple[dict[str, np.ndarray], int]:
    """The last three fields of a `Truth`, and how many boxes were dropped.

    Boxes are clipped to the image; those left without area, degenerate or outside, are dropped.
    """
    boxes = voc.clip(np.reshape(boxes, (-1, 4)).astype("float32"), (0, 0, width, height))
    keep = voc.area(boxes) > 0
    fields = {"boxes": boxes[keep], "labels": labels.astype("int32")[keep], "crowd": crowd.astype(bool)[keep]}
    return fields, int(np.sum(~keep))


def fill(found: Mapping[str, Sequence[Item]], seed: int, source: str) -> dict[str, Sequence[Item]]:
    """The images of train, val and test, in this order; what is missing of the latter is held out of train.

    `found` holds train at least; `source` is named where there are too few images.
    """
    splits = dict(found)
    for name, share in (("test", folders.TEST_SHARE), ("val", folders.VAL_SHARE)):
        if name not in splits:
            rng = np.random.default_rng(seed)
            splits["train"], splits[name] = folders.hold_out(splits["train"], share, rng, source)
    return {name: splits[name] for name in ("train", "val", "test")}


def check_sizes(truths: Sequence[Truth], paths: Sequence[str], annotations: Sequence[str]) -> None:
    """Look into every image file, the pixels left aside, for whether it has the size of its truth.

    Args:
        truths: Of the images.
        paths: Of the image files.
        annotations: The files that the truths are from, for messages.

    Raises:
        UserError: If a file is missing or the size is another.
        RunError: If a file is no image that TensorFlow can read.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_size, truths, paths, annotations):
            pass


def _check_size(truth: Truth, path: str, annotation: str) -> None:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except FileNotFoundError as error:
        raise UserError(f"{annotation} names an image that is not there: {path}") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read image: {path}: {first_line(error)}") from error
    if (width, height) != (truth.width, truth.height):
        raise UserError(
            f"{path} is {width} x {height} pixels, {annotation} says {truth.width} x {truth.height}"
        )
