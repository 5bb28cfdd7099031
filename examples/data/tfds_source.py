"""`--data tfds:NAME`: classification data sets of TensorFlow Datasets."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from examples.common import UserError, first_line, is_disk_full
from examples.data.pipeline import Dataset, StreamSplit, decode_image, fit_square

UNLABELLED_TESTS = {"imagenet2012", "coco", "voc/2012"}
"""Data sets, or configurations of them, whose published test split has no labels."""
VAL_PERCENT, TEST_PERCENT = 5, 20
"""The share of the train split that is held out if there is no validation or test split."""


def load(name: str, size: int, data_dir: str | None) -> Dataset:
    """The data set `name`, downloaded to `data_dir` if necessary, as squares of `size`."""
    builder = prepare(name, data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise UserError(f"tfds:{name} has no image and class label: it is not a classification set")
    splits = {split: _split(builder, part, size) for split, part in slices(builder).items()}
    return Dataset(features["label"].names, splits)


def prepare(name: str, data_dir: str | None) -> Any:
    """The builder of the data set `name`, downloaded to `data_dir` if necessary."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    # Builders raise any type: assertions, network errors, their own types.
    except Exception as error:
        if is_disk_full(error):
            raise
        raise UserError(f"cannot prepare tfds:{name}: {first_line(error)}") from error
    return builder


def slices(builder: Any) -> dict[str, str]:
    """The slices of the data set for train, val and test."""
    # Builders of `tfds.testing.mock_data` do not know their splits and accept any.
    have = set(builder.info.splits) or {"train", "test"}
    config = getattr(builder.builder_config, "name", None)
    if {builder.name, f"{builder.name}/{config}"} & UNLABELLED_TESTS:
        have.discard("test")
    if "train" not in have:
        raise UserError(f"tfds:{builder.name} has no split named train, only {', '.join(sorted(have))}")
    test = next((name for name in ("test", "validation") if name in have), None)
    val = "validation" if "validation" in have and test != "validation" else None
    end = 100
    if test is None:
        test, end = f"train[{end - TEST_PERCENT}%:]", end - TEST_PERCENT
    if val is None:
        val, end = f"train[{end - VAL_PERCENT}%:{end}%]", end - VAL_PERCENT
    return {"train": f"train[:{end}%]", "val": val, "test": test}


def _split(builder: Any, part: str, size: int) -> StreamSplit:
    import tensorflow_datasets as tfds

    # Files in order: shuffling them would not depend on the seed and the epoch.
    decoders = tfds.decode.PartialDecoding(
        {"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}
    )
    dataset = builder.as_dataset(split=part, shuffle_files=False, decoders=decoders)

    def read(example: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        return fit_square(decode_image(example["image"]), size), tf.cast(example["label"], tf.int32)

    count = int(dataset.cardinality())
    return StreamSplit(dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE), count)
