"""Tests of the COCO metrics: agreement with manual calculations, and the conventions of both libraries."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.common import UserError
from examples.detection import coco_metrics
from examples.detection.coco_metrics import Boxes, CocoMetrics


def boxes(image_id, *rows, scores=None, labels=None, crowd=None):
    array = np.array(rows, "float64").reshape(-1, 4)
    labels = np.zeros(len(array), int) if labels is None else np.array(labels)
    scores = None if scores is None else np.array(scores)
    return Boxes(image_id, array, labels, scores, None if crowd is None else np.array(crowd))


def test_by_hand():
    """One box is detected exactly, one with an IoU of 0.62, and one is missed. One detection is wrong."""
    truths = [boxes(7, [0, 0, 50, 50], [60, 60, 90, 95]), boxes(3, [0, 0, 100, 100]), boxes(5)]
    detections = [
        boxes(7, [0, 0, 50, 50], [200, 200, 250, 230], scores=[0.9, 0.8]),
        boxes(3, [0, 0, 100, 62], scores=[0.7]),
    ]
    found = coco_metrics.score(truths, detections, ["thing"])
    # In descending order of scores: right, wrong, right. The recall reaches 1/3 at precision 1, and 2/3 at
    # precision 2/3. Of the recalls 0, 0.01, ..., 1, 34 are at most 1/3, and 33 more are at most 2/3.
    loose, strict = (34 + 33 * 2 / 3) / 101, 34 / 101
    assert found["AP50"] == pytest.approx(loose)
    assert found["AP75"] == pytest.approx(strict)
    assert found["AP"] == pytest.approx((3 * loose + 7 * strict) / 10)  # 0.5, 0.55, 0.6; 0.65, ..., 0.95
    assert found["AR1"] == pytest.approx((3 * 2 / 3 + 7 * 1 / 3) / 10)
    assert found["AR100"] == found["AR1"]
    assert found["AP_S"] is None  # 30x35 pixels are more than 32x32
    assert found["AP50_by_class"] == {"thing": pytest.approx(loose)}


def test_sizes_and_classes():
    truths = [boxes(1, [0, 0, 20, 20], [30, 0, 80, 50], [0, 100, 200, 300], labels=[0, 1, 1])]
    detections = [boxes(1, [0, 0, 20, 20], [0, 100, 200, 300], scores=[0.9, 0.9], labels=[0, 1])]
    found = coco_metrics.score(truths, detections, ["a", "b", "c"])
    assert (found["AP_S"], found["AP_M"], found["AP_L"]) == (pytest.approx(1), 0, pytest.approx(1))
    by_class = found["AP50_by_class"]
    assert by_class["a"] == pytest.approx(1)
    assert by_class["b"] == pytest.approx(51 / 101)
    assert by_class["c"] is None  # no boxes in the data


def test_a_crowd_is_no_false_alarm():
    truths = [boxes(1, [0, 0, 50, 50], [100, 100, 200, 200], crowd=[False, True])]
    right, in_crowd = [0, 0, 50, 50], [110, 110, 150, 150]
    found = coco_metrics.score(truths, [boxes(1, in_crowd, right, scores=[0.9, 0.8])], ["a"])
    assert found["AP"] == pytest.approx(1)


def test_nothing_found_and_nothing_to_find():
    assert coco_metrics.score([boxes(1, [0, 0, 9, 9])], [], ["a"])["AP"] == 0
    assert coco_metrics.score([boxes(1)], [], ["a"])["AP"] is None
    assert coco_metrics.score([boxes(1)], [boxes(1, [0, 0, 9, 9], scores=[0.5])], ["a"])["AP"] is None


def test_errors():
    with pytest.raises(UserError, match=r"image 4: class 2 is not one of 0\.\.1"):
        coco_metrics.score([boxes(4, [0, 0, 9, 9], labels=[2])], [], ["a", "b"])
    with pytest.raises(UserError, match="no ground truth, for image 9"):
        coco_metrics.score([boxes(4)], [boxes(9, [0, 0, 9, 9], scores=[1])], ["a"])
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        CocoMetrics(tf.data.Dataset.range(1), "xyxy", ["a"], every=0)


def test_results_have_the_categories_own_ids():
    found = boxes(42, [1, 2, 4, 8], scores=[0.5], labels=[1])
    (entry,) = coco_metrics.coco_results([found], category_ids=[18, 90])
    assert entry == {"image_id": 42, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.5}


class Echo(keras.Model):
    """Detects the boxes stored in an image's first row, as coordinates divided by 100."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def call(self, images, training=False):
        return images

    def decode_predictions(self, predictions, images):
        found = images[:, 0, :2] * 100
        count = tf.shape(images)[0]
        return {
            "boxes": found,
            "confidence": tf.tile([[0.9, 0.8]], [count, 1]),
            self.names: tf.zeros([count, 2], tf.int32),
            "num_detections": tf.fill([count], 1),  # the second is padding
        }


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("names", ["classes", "labels"])
@pytest.mark.parametrize("bounding_box_format", ["xywh", "rel_xyxy", "yxyx"])
def test_callback(bounding_box_format, names, ragged):
    shown = {"xywh": [10, 20, 30, 40], "rel_xyxy": [0.1, 0.2, 0.4, 0.6], "yxyx": [20, 10, 60, 40]}
    images = np.zeros((3, 100, 100, 4), "float32")
    images[:2, 0, :2] = np.array(shown[bounding_box_format]) / 100  # the third image has a false positive
    images[2, 0, :2] = np.array([0.5, 0.5, 0.9, 0.9])
    rows = [[shown[bounding_box_format]], [shown[bounding_box_format]], []]
    if ragged:
        targets = {
            "boxes": tf.ragged.constant(rows, inner_shape=(4,), dtype=tf.float32, ragged_rank=1),
            names: tf.ragged.constant([[0], [0], []], dtype=tf.float32),
        }
    else:
        padded = [row + [[-1] * 4] * (2 - len(row)) for row in rows]
        targets = {
            "boxes": tf.constant(padded, tf.float32),
            names: tf.constant([[0.0, -1], [0, -1], [-1, -1]]),
        }
    callback = CocoMetrics(
        tf.data.Dataset.from_tensor_slices((images, targets)).batch(2),
        bounding_box_format,
        ["thing"],
        every=2,
    )
    callback.set_model(Echo(names))
    callback.set_params({"epochs": 3})
    logs = {}
    callback.on_epoch_end(0, logs)
    assert np.isnan(logs["coco_AP"])
    callback.on_epoch_end(1, logs)
    # Two true positives and one false positive, which comes last among equal scores.
    assert logs["coco_AP50"] == pytest.approx(1)
    assert logs["coco_AR100"] == pytest.approx(1)
    assert np.isnan(logs["coco_AP_L"])
    callback.data = callback.data.take(0)
    callback.on_epoch_end(2, logs)  # the last epoch is always scored
    assert np.isnan(logs["coco_AP50"])
