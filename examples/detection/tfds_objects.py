"""`--data tfds:NAME`: detection data sets of TensorFlow Datasets, such as `coco/2017` and `voc/2007`.

A data set is read once for its boxes. Encoded images are kept in memory up to `IN_MEMORY_BYTES`. Images of
larger splits (COCO's train, 18 GB) are read from the TFRecord files on demand, through an index of the
records; this requires a disk with fast seeks.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from examples.common import RunError, UserError, first_line
from examples.data import pipeline, tfds_source
from examples.data.pipeline import IN_MEMORY_BYTES
from examples.detection import splits


@dataclasses.dataclass(frozen=True)
class RecordSplit:
    """Images in TFRecord files: paths, offsets and lengths in bytes, all `(n,)`, created by `on_cpu`."""

    truths: Sequence[splits.Truth]
    dropped: int
    paths: tf.Tensor
    offsets: tf.Tensor
    lengths: tf.Tensor

    def image(self, index: tf.Tensor) -> tf.Tensor:
        """See `Split`."""
        place = (self.paths[index], self.offsets[index], self.lengths[index])
        record = tf.ensure_shape(tf.numpy_function(_read_record, place, tf.string, stateful=False), ())
        example = tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature((), tf.string)})
        return pipeline.decode_image(example["image"])


def load(name: str, data_dir: str | None) -> splits.DetectionData:
    """The data set `name`, downloaded to `data_dir` if necessary."""
    builder = tfds_source.prepare(name, data_dir)
    _check_features(name, builder.info.features)
    class_names = builder.info.features["objects"]["label"].names
    parts: dict[str, splits.Split] = {}
    room = IN_MEMORY_BYTES
    for split, part in tfds_source.slices(builder).items():
        parts[split], size = _read(builder, part, len(class_names), room)
        room -= size
    return splits.DetectionData(class_names, range(1, len(class_names) + 1), parts)


def _check_features(name: str, features: Mapping[str, Any]) -> None:
    lacking = [key for key in ("image", "objects") if key not in features] or [
        f"objects/{key}" for key in ("bbox", "label") if key not in features["objects"]
    ]
    if lacking:
        raise UserError(f"tfds:{name} has no {lacking[0]}: it is not a detection set")
    objects = features["objects"]
    if not hasattr(objects["label"], "names"):
        raise UserError(f"tfds:{name}: its object labels are not class labels")
    form = getattr(
        objects["bbox"], "bbox_format", None
    )  # data sets that do not specify a format use TFDS' default
    if form is not None and form.value != "REL_YXYX":
        raise UserError(f"tfds:{name} has boxes of the format {form.value}; only REL_YXYX is supported")


def _read(builder: Any, part: str, classes: int, room: int) -> tuple[splits.Split, int]:
    """The slice `part` of a data set, and the number of bytes it uses, at most `room`."""
    truths: list[splits.Truth] = []
    records, encoded = [], []
    dropped = size = 0
    for example in _examples(builder, part):
        name = f"image {len(truths)} of {builder.name}, {part}"
        truth, lost = _truth(example, len(truths), name, classes)
        truths.append(truth)
        dropped += lost
        records.append(example["tfds_id"].decode())
        size += len(example["image"])
        if size <= room:
            encoded.append(example["image"])
        else:
            encoded.clear()
    truths = _with_own_ids(truths)
    if size <= room:
        return splits.EncodedSplit(truths, dropped, splits.on_cpu(encoded, tf.string)), size
    return RecordSplit(truths, dropped, *_places(builder, records)), 0


def _examples(builder: Any, part: str) -> Iterator[dict[str, Any]]:
    """The examples of a slice in order, with the encoded image and the position as `tfds_id`."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    wanted: dict[str, Any] = {key: True for key in ("image", "image/id", "image/filename") if key in features}
    wanted["objects"] = {key for key in ("bbox", "label", "is_crowd") if key in features["objects"]}
    decoders = tfds.decode.PartialDecoding(wanted, decoders={"image": tfds.decode.SkipDecoding()})
    config = tfds.ReadConfig(add_tfds_id=True, interleave_cycle_length=1)
    dataset = builder.as_dataset(split=part, shuffle_files=False, decoders=decoders, read_config=config)
    return dataset.as_numpy_iterator()


def _truth(example: Mapping[str, Any], index: int, name: str, classes: int) -> tuple[splits.Truth, int]:
    """The truth of an example, with the data set's id if there is one, and the number of dropped boxes."""
    if "image/filename" in example:
        name = example["image/filename"].decode()
    height, width = _size(example["image"], name)
    boxes, labels = example["objects"]["bbox"], example["objects"]["label"]
    strange = labels[(labels < 0) | (labels >= classes)]
    if len(strange):
        raise UserError(f"{name}: a box has the class id {strange[0]}, and there are {classes} classes")
    crowd = example["objects"].get("is_crowd", np.zeros(len(labels), bool))
    boxes = boxes[:, [1, 0, 3, 2]].astype("float64") * [width, height, width, height]
    fields, dropped = splits.clean(boxes, labels, crowd, height, width)
    return splits.Truth(int(example.get("image/id", index)), name, height, width, **fields), dropped


def _size(encoded: bytes, name: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(encoded), formats=splits.FORMATS) as image:
            return image.height, image.width
    except (OSError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read image: {name}: {first_line(error)}") from error


def _with_own_ids(truths: list[splits.Truth]) -> list[splits.Truth]:
    """The truths, renumbered if the ids of the data set are not unique in the slice."""
    if len({truth.image_id for truth in truths}) == len(truths):
        return truths
    return [dataclasses.replace(truth, image_id=index) for index, truth in enumerate(truths)]


# Large splits: TFRecord files with random access


def _places(builder: Any, records: Sequence[str]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Paths, offsets and lengths of the examples with these `tfds_id`s: `FILE__NUMBER`."""
    kind = builder.info.file_format.value
    if kind != "tfrecord":
        raise UserError(
            f"tfds:{builder.name} does not fit into memory and is stored as {kind}; prepare it as tfrecord, "
            "which is read from disk"
        )
    folder = Path(builder.data_dir)
    names = [(file, int(number)) for file, _, number in (record.rpartition("__") for record in records)]
    spans = {file: _spans(folder / file) for file in dict.fromkeys(file for file, _ in names)}
    paths = [str(folder / file) for file, _ in names]
    offsets, lengths = np.array([spans[file][number] for file, number in names], "int64").T
    return splits.on_cpu(paths), splits.on_cpu(offsets), splits.on_cpu(lengths)


def _spans(path: Path) -> list[tuple[int, int]]:
    """Offset and length of each record; 8 bytes of length and 4 of checksum precede it, 4 follow it."""
    spans = []
    try:
        with path.open("rb", buffering=0) as file:
            while header := file.read(12):
                (length,) = struct.unpack("<Q", header[:8])
                spans.append((file.tell(), length))
                file.seek(length + 4, io.SEEK_CUR)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it must be a file of this machine") from error
    return spans


def _read_record(path: bytes, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)
