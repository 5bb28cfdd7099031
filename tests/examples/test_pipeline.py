import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples import classify
from examples.data.pipeline import (
    ArraySplit,
    EpochClock,
    Split,
    StreamSplit,
    evaluation_batches,
    fit_square,
    scale_and_cut,
    training_batches,
)

COUNT, CLASSES = 22, 11


def make_split(kind: str) -> Split:
    labels = np.arange(COUNT, dtype="int32") % CLASSES
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype="uint8")
    images[:, 0, 0, 0] = np.arange(COUNT)
    if kind == "array":
        return ArraySplit(images, labels)
    return StreamSplit(tf.data.Dataset.from_tensor_slices((images, labels)), COUNT)


def clock_at(epoch: int, seed: int = 5) -> EpochClock:
    clock = EpochClock(seed)
    clock.set_model(keras.Sequential())
    clock.on_epoch_begin(epoch)
    return clock


def read(batches: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("kind", ["array", "stream"])
def test_an_epoch_holds_every_image_once(kind: str) -> None:
    images, labels = read(training_batches(make_split(kind), CLASSES, 2, clock_at(0), []))
    order = images[:, 0, 0, 0].astype(int)
    assert sorted(order) == list(range(COUNT))
    assert order.tolist() != list(range(COUNT))
    np.testing.assert_array_equal(labels, np.eye(CLASSES)[order % CLASSES])


QUICK = [("array", "none"), ("stream", "crop"), ("array", "zoom")]
ALL = itertools.product(("array", "stream"), classify.CHOICES["augment"])


@pytest.mark.parametrize(
    ("kind", "augment"),
    [pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow]) for pair in ALL],
)
def test_seed_and_epoch_decide_all(kind: str, augment: str) -> None:
    keras.utils.set_random_seed(0)  # TensorFlow treats the seed 0 specially
    layers = classify.augmentation(augment)

    def epoch(*key: int) -> np.ndarray:
        return read(training_batches(make_split(kind), CLASSES, 4, clock_at(*key), layers))[0]

    first = epoch(3)
    assert np.ptp(first) > 100
    assert first.min() >= 0
    assert first.max() <= 255
    np.testing.assert_array_equal(first, epoch(3))
    assert not np.array_equal(first, epoch(4))
    assert not np.array_equal(first, epoch(3, 6))


def test_one_pipeline_follows_the_clock() -> None:
    clock = clock_at(0)
    batches = training_batches(make_split("array"), CLASSES, 4, clock, classify.augmentation("aerial"))
    first = read(batches)[0]
    clock.on_epoch_begin(1)
    assert not np.array_equal(first, read(batches)[0])
    clock.on_epoch_begin(0)
    np.testing.assert_array_equal(first, read(batches)[0])


def test_dropout_follows_the_clock() -> None:
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dropout(0.5)])
    clock = EpochClock(5)
    clock.set_model(model)
    ones = np.ones((1, 100), "float32")

    def drop(epoch: int) -> np.ndarray:
        clock.on_epoch_begin(epoch)
        return np.asarray(model(ones, training=True))

    first = drop(0)
    assert not np.array_equal(first, drop(1))
    np.testing.assert_array_equal(first, drop(0))


def test_incomplete_batches() -> None:
    split = make_split("array")
    assert len(training_batches(split, CLASSES, 4, clock_at(0), [])) == COUNT // 4
    assert read(training_batches(split, CLASSES, 100, clock_at(0), []))[0].shape[0] == COUNT
    images, _ = read(evaluation_batches(split, CLASSES, 4))
    assert images[:, 0, 0, 0].tolist() == list(range(COUNT))


@pytest.mark.parametrize("size", [16, 17, 40])
def test_an_image_that_fits_is_the_one_that_scaling_would_give(size: int) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype="uint8")
    np.testing.assert_array_equal(fit_square(pixels, size), pixels)
    np.testing.assert_array_equal(scale_and_cut(pixels, size), pixels)
