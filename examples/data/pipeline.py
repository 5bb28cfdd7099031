"""Splits of labelled images, and their tf.data batches.

Order and augmentation of a training epoch depend only on the seed and the number of the epoch: a resumed run
sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf

from examples.common import RunError, first_line

IN_MEMORY_BYTES = 2**30
"""Decoded images up to this size are kept in memory; larger sets are read again each epoch."""
_AT_ONCE = 256  # images that are decoded together


class Split(Protocol):
    """A fixed number of labelled images."""

    count: int

    def examples(self, key: tf.Tensor | None) -> tf.data.Dataset:
        """`(image, label)` pairs: uint8 `(size, size, 3)` and int32; shuffled by `key` unless it is None.

        `key` contains the seed and the epoch, int64 of shape `(2,)`.
        """


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The names of the classes, by label, and the splits train, val and test."""

    class_names: Sequence[str]
    splits: Mapping[str, Split]


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Images in memory: uint8 of shape `(n, size, size, 3)`, and int32 labels."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.labels)

    def examples(self, key: tf.Tensor | None) -> tf.data.Dataset:
        """See `Split`."""
        with tf.device("cpu"):
            images, labels = tf.constant(self.images), tf.constant(self.labels)
        return indices(self.count, key).map(lambda index: (images[index], labels[index]))


@dataclasses.dataclass(frozen=True)
class FileSplit:
    """Image files that are decoded on demand and resized to `size` by `size`."""

    paths: Sequence[str]
    labels: np.ndarray
    size: int

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.paths)

    def examples(self, key: tf.Tensor | None) -> tf.data.Dataset:
        """See `Split`."""
        with tf.device("cpu"):
            paths, labels = tf.constant(self.paths), tf.constant(self.labels)

        def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return read_image(paths[index], self.size), labels[index]

        return indices(self.count, key).map(read, num_parallel_calls=tf.data.AUTOTUNE)

    def load(self) -> ArraySplit:
        """Decode every image; the first unreadable one raises an error that names it."""
        images = np.empty((self.count, self.size, self.size, 3), "uint8")
        with tf.device("cpu"):
            paths = tf.data.Dataset.from_tensor_slices(list(self.paths))
            batches = paths.map(lambda path: read_image(path, self.size), tf.data.AUTOTUNE).batch(_AT_ONCE)
        loaded = 0
        try:
            for batch in batches.as_numpy_iterator():
                images[loaded : loaded + len(batch)] = batch
                loaded += len(batch)
        except tf.errors.OpError:
            check_files(self.paths[loaded : loaded + _AT_ONCE])
            raise
        return ArraySplit(images, self.labels)

    def check(self) -> None:
        """Decode every image without keeping it, to name the one that stopped a run."""
        check_files(self.paths)


@dataclasses.dataclass(frozen=True)
class StreamSplit:
    """A dataset that can only be read sequentially; it is shuffled within a buffer."""

    dataset: tf.data.Dataset
    count: int
    buffer: int = 10_000

    def examples(self, key: tf.Tensor | None) -> tf.data.Dataset:
        """See `Split`."""
        if key is None:
            return self.dataset

        def shuffle(_: tf.Tensor) -> tf.data.Dataset:
            # Sets the seed of this function's graph only. If it were 0 (`--seed 0`), TensorFlow would also
            # compare the other seed, a tensor here, with 0, which fails while tracing.
            tf.random.set_seed(1)
            return self.dataset.shuffle(self.buffer, seed=mix(key))

        # Inside `flat_map`, the seed is read at the start of an epoch, not when the pipeline is built.
        return tf.data.Dataset.from_tensors(0).flat_map(shuffle)


def indices(count: int, key: tf.Tensor | None) -> tf.data.Dataset:
    """0 to `count - 1`, int64, in an order given by `key` unless it is `None`."""
    numbers = tf.data.Dataset.range(count)
    if key is None:
        return numbers
    # `index_shuffle` computes a permutation element by element, without a buffer.
    return numbers.map(lambda index: tf.random.experimental.index_shuffle(index, key, count - 1))


def read_image(path: tf.Tensor, size: int) -> tf.Tensor:
    """Decode a JPEG, PNG, BMP, WebP or the first frame of a GIF into uint8 `(size, size, 3)`."""
    return fit_square(decode_image(tf.io.read_file(path)), size)


def decode_image(content: tf.Tensor) -> tf.Tensor:
    """The uint8 `(height, width, 3)` pixels of an encoded image, or of the first frame of a GIF."""
    image = tf.io.decode_image(content, channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def fit_square(image: tf.Tensor, size: int) -> tf.Tensor:
    """A uint8 image resized by `scale_and_cut`, or unchanged if it has the size already."""
    image = tf.convert_to_tensor(image)
    fits = tf.reduce_all(tf.shape(image)[:2] == size)
    image = tf.cond(fits, lambda: image, lambda: scale_and_cut(image, size))
    return tf.ensure_shape(image, (size, size, 3))


def scale_and_cut(image: tf.Tensor, size: int) -> tf.Tensor:
    """Scale the shorter side of a uint8 image to `size`, with anti-aliasing, and crop the center."""
    shape = tf.shape(image)[:2]
    scaled = tf.cast(tf.math.ceil(size * shape / tf.reduce_min(shape)), tf.int32)
    image = tf.image.resize(image, scaled, "bicubic", antialias=True)
    image = tf.image.resize_with_crop_or_pad(image, size, size)
    return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)


def check_files(paths: Sequence[str]) -> None:
    """Decode every image without keeping it; the first unreadable one raises an error that names it."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_file, paths):
            pass


def _check_file(path: str) -> None:
    try:
        with tf.device("cpu"):
            decode_image(tf.io.read_file(path))
    except tf.errors.OpError as error:
        raise RunError(f"cannot read image: {path}: {first_line(error)}") from error


class EpochClock(keras.callbacks.Callback):
    """Passes the number of the epoch to the data pipeline and the model's dropout."""

    def __init__(self, seed: int) -> None:
        """`seed` and the epoch determine all random numbers of an epoch."""
        super().__init__()
        self.seed = seed
        with tf.device("cpu"):
            self.key = tf.Variable([seed, 0], dtype="int64", trainable=False)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Set the epoch; Keras reads the data of the epoch after this call."""
        self.key.assign([self.seed, epoch])
        for layer in self.model.layers:
            if isinstance(layer, keras.layers.Dropout) and layer.rate:
                layer.seed_generator.state.assign([self.seed, epoch])


class _BatchSeed(keras.random.SeedGenerator):
    """Stateless seeds that depend only on the number of the batch and the seeds already drawn for it.

    The base class counts in a variable, so its seeds depend on the order in which parallel workers read it.
    """

    def __init__(self, key: tf.Tensor, batch: tf.Tensor) -> None:
        self.key, self.batch, self.draws = key, batch, 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        self.draws += 1
        return tf.stack([mix(self.key), 256 * self.batch + self.draws])


def mix(key: tf.Tensor) -> tf.Tensor:
    """Combines the seed and the epoch into one number."""
    return key[0] * 1_000_003 + key[1]


def training_batches(
    split: Split, classes: int, batch_size: int, clock: EpochClock, layers: Sequence[keras.Layer]
) -> tf.data.Dataset:
    """Batches of one epoch, shuffled, augmented by Keras preprocessing `layers`, with one-hot labels.

    An incomplete last batch is dropped unless it is the only one.
    """

    def augment(number: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = batch
        images = tf.cast(images, tf.float32)
        seed = _BatchSeed(clock.key, number)
        for layer in layers:
            images = layer.transform_images(images, layer.get_random_transformation(images, seed=seed))
        return images, tf.one_hot(labels, classes)

    batches = split.examples(clock.key).batch(batch_size, drop_remainder=split.count >= batch_size)
    return counted(batches.enumerate().map(augment, tf.data.AUTOTUNE), split.count // batch_size or 1)


def evaluation_batches(split: Split, classes: int, batch_size: int) -> tf.data.Dataset:
    """Batches in order, with one-hot labels."""
    batches = split.examples(None).batch(batch_size)
    batches = batches.map(lambda images, labels: (tf.cast(images, tf.float32), tf.one_hot(labels, classes)))
    return counted(batches, -(-split.count // batch_size))


def counted(batches: tf.data.Dataset, count: int) -> tf.data.Dataset:
    """`batches` with a known `count`, for Keras' progress bar, and with prefetching."""
    return batches.apply(tf.data.experimental.assert_cardinality(count)).prefetch(tf.data.AUTOTUNE)
