"""Tests of the batches of images and boxes: resizing, augmentation, padding, and order.

Test images contain one bright rectangle per color channel, which identifies its box.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.data.pipeline import EpochClock
from examples.detection import batches
from examples.detection.data import Truth, evaluation_batches, resize_scale, training_batches
from examples.detection.splits import EncodedSplit, Subset, on_cpu

SIZE = 64
RED, GREEN, BLUE = (15, 10, 26, 20), (30, 2, 50, 8), (1, 1, 9, 29)


def picture(boxes: list[tuple[int, int, int, int]], width: int, height: int) -> np.ndarray:
    """A black image with a rectangle in a separate color for each of up to three boxes."""
    image = np.zeros((height, width, 3), "uint8")
    for color, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2, color] = 255
    return image


def truth(index: int, image: np.ndarray, boxes: list, crowd: list[bool] | None = None) -> Truth:
    height, width = image.shape[:2]
    corners = np.array(boxes, "float32").reshape(-1, 4)
    labels = np.arange(len(boxes), dtype="int32") % 3
    crowds = np.array(crowd or [False] * len(boxes), bool)
    return Truth(index, f"{index}", height, width, corners, labels, crowds)


def split_of(pictures: list[tuple[np.ndarray, list]]) -> EncodedSplit:
    encoded = [tf.io.encode_png(image).numpy() for image, _ in pictures]
    truths = [truth(index, *pair) for index, pair in enumerate(pictures)]
    return EncodedSplit(truths, 0, on_cpu(encoded, tf.string))


def numbered(count: int) -> EncodedSplit:
    """Gray images of different sizes with one box each. The gray level identifies the image."""
    return split_of(
        [(np.full((16 + i % 3, 20, 3), 10 * i + 5, "uint8"), [(0, 0, i % 7 + 1, 8)]) for i in range(count)]
    )


def clock_at(epoch: int, seed: int = 5) -> EpochClock:
    clock = EpochClock(seed)
    clock.set_model(keras.Sequential())
    clock.on_epoch_begin(epoch)
    return clock


def read(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the images, boxes, and classes of an epoch."""
    images, targets = zip(*dataset.as_numpy_iterator(), strict=True)
    boxes = np.concatenate([target["boxes"] for target in targets])
    return np.concatenate(images), boxes, np.concatenate([target["classes"] for target in targets])


def bright(channel: np.ndarray) -> list[int]:
    """The bounding box of the pixels brighter than 50%."""
    y, x = np.nonzero(channel > 127)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (128, 64),
        (23, 40),
        *(pytest.param(*size, marks=pytest.mark.slow) for size in [(64, 128), (32, 16), (57, 31), (64, 64)]),
    ],
)
def test_squares_without_augmentation(width: int, height: int) -> None:
    box = (width // 4, height // 5, width // 2, height - 3)
    split = split_of([(picture([box], width, height), [box])])
    images, boxes, classes = read(training_batches(split, SIZE, 1, clock_at(0), augment=False))
    scale = resize_scale(height, width, SIZE)
    assert scale * max(width, height) == SIZE
    np.testing.assert_allclose(boxes[0, 0] / scale, box, rtol=1e-6)
    # A pixel is bright if its center is in the box. Downsampling moves borders by less than a pixel.
    np.testing.assert_allclose(bright(images[0, ..., 0]), boxes[0, 0], atol=0.51 if scale >= 1 else 1)
    assert classes.tolist() == [[0]]


def test_the_square_is_filled_from_the_upper_left_corner() -> None:
    split = split_of([(np.full((20, 40, 3), 200, "uint8"), [])])
    ((images, _),) = evaluation_batches(split, SIZE, 1).as_numpy_iterator()
    expected = np.zeros((1, SIZE, SIZE, 3))
    expected[:, :32] = 200
    np.testing.assert_allclose(images, expected, atol=1e-3)


def test_shrinking_is_free_of_aliasing() -> None:
    stripes = np.zeros((256, 256, 3), "uint8")
    stripes[:, ::2] = 255
    ((images, _),) = evaluation_batches(split_of([(stripes, [])]), 25, 1).as_numpy_iterator()
    np.testing.assert_allclose(images, 127.5, atol=16)


def test_pixels_stay_as_they_are_at_their_own_size() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), "uint8")
    ((images, _),) = evaluation_batches(split_of([(image, [])]), SIZE, 1).as_numpy_iterator()
    np.testing.assert_allclose(images[0], image, atol=1e-3)


def test_augmentation_moves_boxes_with_their_pixels() -> None:
    width, height = 60, 30
    boxes = [RED, GREEN, BLUE]
    split = split_of([(picture(boxes, width, height), boxes)] * 50)
    clock = clock_at(0)
    dataset = training_batches(split, SIZE, 10, clock, augment=True)
    mirrored, areas = [], []
    for epoch in range(4):
        clock.on_epoch_begin(epoch)
        for image, found, classes in zip(*read(dataset), strict=True):
            # The red rectangle is never cropped, so its area reveals the scale.
            area = image[..., 0].sum() / 255 / 110
            areas.append(area)
            kept = {int(label): box for label, box in zip(classes, found, strict=True) if label >= 0}
            for label, full in ((0, 110), (1, 120), (2, 224)):
                share = image[..., label].sum() / 255 / (full * area)
                assert label in kept if share > 0.36 else share > 0.3 or label not in kept
                if label in kept:
                    assert kept[label].min() >= 0
                    assert kept[label].max() <= SIZE
                    np.testing.assert_allclose(bright(image[..., label]), kept[label], atol=0.6)
            np.testing.assert_array_equal(found[len(kept) :], -1)
            if 2 in kept:
                mirrored.append(kept[0][0] < kept[2][0])
    scale = np.sqrt(areas) / resize_scale(height, width, SIZE)
    assert scale.min() == pytest.approx(0.75, abs=0.03)
    assert scale.max() == pytest.approx(1.33, abs=0.04)
    assert len(mirrored) > 100
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.2)


def test_augmented_pictures_lie_anywhere() -> None:
    split = split_of([(np.full((30, 60, 3), 255, "uint8"), [(0, 0, 60, 30)])] * 200)
    _, boxes, _ = read(training_batches(split, SIZE, 50, clock_at(0), augment=True))
    x1, y1, x2, y2 = boxes[:, 0].T
    assert ((x1 == 0) & (x2 == SIZE)).sum() > 50  # larger than the square, and cropped
    smaller = (x1 > 0) & (x2 < SIZE)
    assert smaller.sum() > 50
    assert np.ptp(x1[smaller] / (SIZE - (x2 - x1)[smaller])) > 0.9
    assert y1.min() < 4
    assert y2.max() > SIZE - 4


def test_boxes_that_are_cut_or_too_small() -> None:
    boxes = tf.constant(
        [
            [10, 5, 20, 10],  # inside
            [-13, 0, 7, 10],  # 0.35 remains, on the left
            [-14, 0, 6, 10],  # 0.3
            [0, 13, 10, 33],  # 0.35, at the bottom
            [0, 14, 10, 34],  # 0.3
            [-50, 0, -20, 10],  # outside
            [0, 0, 0.6, 10],  # 1.2 pixels of the square
            [0, 0, 0.4, 10],  # 0.8
            [0, 0, 10, 0.4],
        ],
        tf.float32,
    )
    cut, keep = batches._move(boxes, tf.constant(2.0), tf.constant([0.0, 0.0]), 40)
    assert keep.numpy().tolist() == [True, True, False, True, False, False, True, False, False]
    np.testing.assert_allclose(
        cut.numpy()[:4], [[20, 10, 40, 20], [0, 0, 14, 20], [0, 0, 12, 20], [0, 26, 20, 40]]
    )
    cut, _ = batches._move(boxes[:1], tf.constant(0.5), tf.constant([3.0, -7.0]), 40)
    np.testing.assert_allclose(cut, [[0, 5.5, 3, 8]])


@pytest.mark.parametrize("augment", [pytest.param(False, marks=pytest.mark.slow), True])
def test_seed_and_epoch_decide_all(augment: bool) -> None:
    keras.utils.set_random_seed(0)

    def epoch(*key: int) -> tuple[np.ndarray, ...]:
        return read(training_batches(numbered(22), 16, 4, clock_at(*key), augment))

    first = epoch(3)
    for one, other in zip(first, epoch(3), strict=True):
        np.testing.assert_array_equal(one, other)
    for key in ((4,), (3, 6)):
        for one, other in zip(first[:2], epoch(*key)[:2], strict=True):
            assert not np.array_equal(one, other)


def test_one_pipeline_follows_the_clock() -> None:
    clock = clock_at(0)
    dataset = training_batches(numbered(22), 16, 4, clock, augment=True)
    first = read(dataset)[0]
    clock.on_epoch_begin(1)
    assert not np.array_equal(first, read(dataset)[0])
    clock.on_epoch_begin(0)
    np.testing.assert_array_equal(first, read(dataset)[0])


def test_one_picture_is_augmented_in_many_ways() -> None:
    split = split_of([(picture([RED], 60, 30), [RED])] * 8)
    clock = clock_at(0)
    dataset = training_batches(split, SIZE, 8, clock, augment=True)
    first = read(dataset)[1]
    clock.on_epoch_begin(1)
    assert len(np.unique(np.concatenate([first, read(dataset)[1]]), axis=0)) == 16


def test_an_epoch_holds_every_image_once() -> None:
    images, boxes, _ = read(training_batches(numbered(22), 16, 2, clock_at(0), augment=False))
    order = (images[:, 0, 0, 0].round().astype(int) - 5) // 10
    assert sorted(order) == list(range(22))
    assert order.tolist() != list(range(22))
    np.testing.assert_allclose(boxes[:, 0, 2], (order % 7 + 1) * 0.8, rtol=1e-6)


def test_incomplete_batches() -> None:
    split = numbered(22)
    dataset = training_batches(split, 16, 4, clock_at(0), augment=True)
    assert len(dataset) == len(list(dataset)) == 5
    dataset = training_batches(split, 16, 100, clock_at(0), augment=True)
    assert len(dataset) == 1
    assert read(dataset)[0].shape == (22, 16, 16, 3)


def test_evaluation_batches_are_in_order() -> None:
    dataset = evaluation_batches(numbered(22), 16, 4)
    assert len(dataset) == 6
    images, indices = zip(*dataset.as_numpy_iterator(), strict=True)
    assert [len(part) for part in images] == [4, 4, 4, 4, 4, 2]
    assert np.concatenate(indices).tolist() == list(range(22))
    assert indices[0].dtype == "int64"
    np.testing.assert_allclose(np.concatenate(images)[:, 0, 0, 0], 10 * np.arange(22) + 5, atol=1e-3)


def test_shapes_are_known_before_reading() -> None:
    images, targets = training_batches(numbered(22), 16, 4, clock_at(0), augment=True).element_spec
    assert images == tf.TensorSpec((4, 16, 16, 3), tf.float32)
    assert targets == {
        "boxes": tf.TensorSpec((4, 1, 4), tf.float32),
        "classes": tf.TensorSpec((4, 1), tf.float32),
    }
    assert evaluation_batches(numbered(2), 16, 4).element_spec == (
        tf.TensorSpec((None, 16, 16, 3), tf.float32),
        tf.TensorSpec((None,), tf.int64),
    )


@pytest.mark.parametrize("augment", [False, True])
def test_no_box_one_box_and_500_boxes(augment: bool) -> None:
    blank = np.zeros((40, 40, 3), "uint8")
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 20, (500, 2))
    many = np.concatenate([corners, corners + rng.uniform(3, 20, (500, 2))], axis=1)
    split = split_of([(blank, []), (blank, [(1, 2, 13, 14)]), (blank, many.tolist())])
    images, boxes, classes = read(training_batches(split, 40, 3, clock_at(0), augment))
    assert images.shape == (3, 40, 40, 3)
    assert boxes.shape == (3, 500, 4)
    assert classes.shape == (3, 500)
    np.testing.assert_array_equal((boxes == -1).all(axis=-1), classes == -1)
    counts = (classes >= 0).sum(axis=1)
    for row, count in zip(classes, counts, strict=True):
        assert (row[:count] >= 0).all()  # padding comes last
    if augment:
        assert 250 < counts.max() <= 500
        return
    assert sorted(counts) == [0, 1, 500]
    np.testing.assert_allclose(boxes[counts.argmax()], split.truths[2].boxes, rtol=1e-6)
    np.testing.assert_array_equal(classes[counts.argmax()], split.truths[2].labels)


@pytest.mark.parametrize("augment", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pictures_without_any_box(augment: bool) -> None:
    split = split_of([(np.zeros((8, 8, 3), "uint8"), [])] * 2)
    _, boxes, classes = read(training_batches(split, 8, 2, clock_at(0), augment))
    np.testing.assert_array_equal(boxes, np.full((2, 1, 4), -1))
    np.testing.assert_array_equal(classes, np.full((2, 1), -1))


def test_crowds_are_left_out_of_training() -> None:
    image = np.zeros((64, 64, 3), "uint8")
    marked = truth(0, image, [(0, 0, 60, 60), (1, 2, 3, 4)], [True, False])
    split = EncodedSplit([marked], 0, on_cpu([tf.io.encode_png(image).numpy()], tf.string))
    _, boxes, classes = read(training_batches(split, 64, 1, clock_at(0), False))
    assert boxes.tolist() == [[[1, 2, 3, 4]]]
    assert classes.tolist() == [[1]]


@pytest.mark.parametrize(("height", "width", "scale"), [(100, 50, 0.64), (10, 64, 1.0), (16, 8, 4.0)])
def test_resize_scale(height: int, width: int, scale: float) -> None:
    assert resize_scale(height, width, 64) == scale


def test_scored_batches_have_every_image_in_order_and_its_targets() -> None:
    split = split_of(
        [
            (picture([RED, GREEN], 64, 32), [RED, GREEN]),
            (picture([], 64, 32), []),
            (picture([BLUE], 32, 16), [BLUE]),
        ]
    )
    images, boxes, classes = read(batches.scored_batches(split, SIZE, 2))
    plain, _ = zip(*evaluation_batches(split, SIZE, 2).as_numpy_iterator(), strict=True)
    np.testing.assert_array_equal(images, np.concatenate(plain))
    np.testing.assert_array_equal(boxes[0], [RED, GREEN])
    np.testing.assert_array_equal(boxes[2, 0], 2 * np.array(BLUE))  # the image is half as large
    np.testing.assert_array_equal(classes, [[0, 1], [-1, -1], [0, -1]])
    assert (boxes[classes < 0] == -1).all()


def test_subset() -> None:
    whole = numbered(6)
    some = Subset(whole, [4, 1])
    assert [truth.image_id for truth in some.truths] == [4, 1]
    np.testing.assert_array_equal(some.image(tf.constant(0)), whole.image(tf.constant(4)))
    images, _ = next(iter(evaluation_batches(some, SIZE, 2)))
    expected, _ = next(iter(evaluation_batches(whole, SIZE, 6)))
    np.testing.assert_array_equal(images, expected.numpy()[[4, 1]])
