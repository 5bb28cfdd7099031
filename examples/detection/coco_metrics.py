"""COCO metrics, computed by pycocotools, for lists of boxes and for detectors during training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from examples.common import UserError

NAMES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")
"""The results of `COCOeval.summarize`, in its order; sizes are S < 32^2 <= M < 96^2 <= L pixels."""


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The boxes of one image, float `(n, 4)`, `(x1, y1, x2, y2)` in pixels, with labels.

    `scores` are those of a detector. `crowd` marks regions of many objects, where COCO counts no false
    positives.
    """

    image_id: int
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None


def score(truths: Sequence[Boxes], detections: Sequence[Boxes], class_names: Sequence[str]) -> dict[str, Any]:
    """Computes the twelve COCO metrics and the AP50 of each class.

    Args:
        truths: For every image, including those without boxes.
        detections: For images that have a truth.
        class_names: By label.

    Returns:
        `NAMES`, each in 0..1, or `None` without objects of this size; and `AP50_by_class`.

    Raises:
        UserError: If a label is not a class, or if there are detections for an image without truth.
    """
    for boxes in (*truths, *detections):
        _check_labels(boxes, len(class_names))
    strange = {boxes.image_id for boxes in detections} - {boxes.image_id for boxes in truths}
    if strange:
        raise UserError(f"there are detections, but no ground truth, for image {min(strange)}")
    from pycocotools import cocoeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        truth = _index(coco_dataset(truths, class_names))
        results = coco_results(detections)
        # `loadRes` does not accept an empty list.
        found = truth.loadRes(results) if results else _index({**truth.dataset, "annotations": []})
        evaluation = cocoeval.COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = [None if value < 0 else float(value) for value in evaluation.stats]
    return {**dict(zip(NAMES, figures, strict=True)), "AP50_by_class": _by_class(evaluation, class_names)}


def _index(dataset: dict[str, Any]) -> Any:
    from pycocotools import coco

    indexed = coco.COCO()
    indexed.dataset = dataset
    indexed.createIndex()
    return indexed


def _check_labels(boxes: Boxes, classes: int) -> None:
    wrong = boxes.labels[(boxes.labels < 0) | (boxes.labels >= classes)]
    if len(wrong):
        raise UserError(f"image {boxes.image_id}: class {int(wrong[0])} is not one of 0..{classes - 1}")


def _by_class(evaluation: Any, class_names: Sequence[str]) -> dict[str, float | None]:
    # Axes: IoU threshold (first 0.5), recall, class, size (first all), number of detections (last 100).
    precision = evaluation.eval["precision"][0, :, :, 0, -1]
    means = [float(column.mean()) if (column > -1).all() else None for column in precision.T]
    return dict(zip(class_names, means, strict=True))


def coco_dataset(truths: Sequence[Boxes], class_names: Sequence[str]) -> dict[str, Any]:
    """The truths in COCO format; classes are numbered from 1."""
    annotations = []
    for truth in truths:
        crowd = np.zeros(len(truth.boxes), bool) if truth.crowd is None else truth.crowd
        for box, label, iscrowd in zip(truth.boxes, truth.labels, crowd, strict=True):
            x, y, width, height = _xywh(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": truth.image_id,
                    "category_id": int(label) + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(iscrowd),
                }
            )
    return {
        "images": [{"id": truth.image_id} for truth in truths],
        "categories": [{"id": id_, "name": name} for id_, name in enumerate(class_names, 1)],
        "annotations": annotations,
    }


def coco_results(
    detections: Sequence[Boxes], category_ids: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The detections in the COCO results format of the evaluation server."""
    return [
        {
            "image_id": found.image_id,
            "category_id": category_ids[int(label)] if category_ids else int(label) + 1,
            "bbox": _xywh(box),
            "score": float(confidence),
        }
        for found in detections
        for box, label, confidence in zip(found.boxes, found.labels, found.scores, strict=True)
    ]


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]


def decode(model: keras.Model, images: Any) -> dict[str, Any]:
    """The detections of a KerasCV or KerasHub detector in preprocessed images."""
    inputs = {"images": images} if isinstance(getattr(model, "input", None), Mapping) else images
    return model.decode_predictions(model(inputs, training=False), images)


def unpack(predictions: Mapping[str, Any], bounding_box_format: str, size: tuple[int, int]) -> list[Boxes]:
    """The predictions of a KerasCV or KerasHub detector for images of `size` (height, width)."""
    boxes = _to_xyxy(predictions["boxes"], bounding_box_format, size)
    labels = np.asarray(predictions["classes" if "classes" in predictions else "labels"])
    scores = np.asarray(predictions["confidence"])
    found = []
    for number, count in enumerate(np.asarray(predictions["num_detections"]).reshape(-1).tolist()):
        found.append(
            Boxes(number, boxes[number, :count], labels[number, :count].astype(int), scores[number, :count])
        )
    return found


def unpack_targets(
    targets: Mapping[str, Any], bounding_box_format: str, size: tuple[int, int]
) -> list[Boxes]:
    """The boxes of a batch of targets, ragged or padded with classes of -1."""
    dense = {
        name: value.to_tensor(-1) if isinstance(value, tf.RaggedTensor) else tf.convert_to_tensor(value)
        for name, value in targets.items()
    }
    labels = np.asarray(dense["classes" if "classes" in dense else "labels"])
    boxes = _to_xyxy(dense["boxes"], bounding_box_format, size)
    return [
        Boxes(number, boxes[number, of_image >= 0], of_image[of_image >= 0].astype(int))
        for number, of_image in enumerate(labels)
    ]


def _to_xyxy(boxes: Any, bounding_box_format: str, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    converted = keras.utils.bounding_boxes.convert_format(
        keras.ops.cast(boxes, "float32"),
        source=bounding_box_format.lower(),
        target="xyxy",
        height=height,
        width=width,
    )
    return np.asarray(converted)


class CocoMetrics(keras.callbacks.Callback):
    """Scores a KerasCV or KerasHub detector on a dataset every few epochs.

    The metrics are added to the logs of the epoch as `coco_AP`, `coco_AP50`, ..., for later callbacks such as
    CSVLogger, TensorBoard and ModelCheckpoint; list it before them. Boxes are scored in pixels of the model's
    input.

    Args:
        data: tf.data batches of images and targets: dictionaries with "boxes" and "classes" or "labels",
            padded with -1 or ragged.
        bounding_box_format: Keras' name of the format of targets and model: "xyxy", "xywh", "rel_yxyx".
        class_names: By label.
        every: Number of epochs between scores; the last epoch is always scored.
    """

    def __init__(
        self, data: tf.data.Dataset, bounding_box_format: str, class_names: Sequence[str], every: int = 1
    ) -> None:
        """Score on `data`."""
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` must be at least 1. Received: every={every}")
        self.data, self.bounding_box_format = data, bounding_box_format
        self.class_names, self.every = class_names, every
        self.figures: dict[str, Any] = {}

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Score if due, and add the metrics to the logs; in other epochs, repeat the last ones."""
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.params.get("epochs"):
            self.figures = self.evaluate()
        if logs is not None:
            figures = {name: self.figures.get(name) for name in NAMES}
            logs.update(
                {f"coco_{name}": np.nan if value is None else value for name, value in figures.items()}
            )

    def set_model(self, model: keras.Model) -> None:
        """Compile the prediction once for all evaluations."""
        super().set_model(model)
        # `predict_on_batch` of KerasCV 0.9.0's RetinaNet fails, and `predict` requires batches without
        # targets.
        self.predict = tf.function(lambda images: decode(model, images), reduce_retracing=True)

    def evaluate(self) -> dict[str, Any]:
        """Predicts the whole dataset and scores it; see `score`."""
        truths: list[Boxes] = []
        detections: list[Boxes] = []
        for images, targets in self.data:
            size = tuple(images.shape[1:3])
            start = len(truths)
            predictions = self.predict(images)
            for found, into in (
                (unpack_targets(targets, self.bounding_box_format, size), truths),
                (unpack(predictions, self.bounding_box_format, size), detections),
            ):
                into += [dataclasses.replace(boxes, image_id=start + boxes.image_id) for boxes in found]
        return score(truths, detections, self.class_names)
