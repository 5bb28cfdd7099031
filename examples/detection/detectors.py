"""RetinaNets of KerasCV and KerasHub on a ResNet, with or without gates, with one interface."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from examples import backbones
from examples.common import UserError, first_line
from examples.detection.coco_metrics import decode

LIBRARIES = ("keras_cv", "keras_hub")
FORMAT = "xyxy"
"""The format of all boxes, in pixels."""
RESNETS = {"resnet18": ("basic_block", [2, 2, 2, 2]), "resnet50": ("bottleneck_block", [3, 4, 6, 3])}
_FILTERS, _STRIDES = [64, 128, 256, 512], [1, 2, 2, 2]
PRIOR = 0.01
"""The initial score of all boxes: Lin et al., arXiv 1708.02002, section 4.1."""
_PRIOR_BIAS = -math.log((1 - PRIOR) / PRIOR)


@dataclasses.dataclass(frozen=True)
class Detector:
    """A RetinaNet of one of the libraries."""

    model: keras.Model
    library: str
    preprocess: Callable[[Any], Any]
    """Maps pixels of 0..255 to inputs of the model."""

    def batches(self, data: tf.data.Dataset) -> tf.data.Dataset:
        """Maps batches of pixels and padded "boxes" and "classes" to the inputs of `fit`."""
        classes = "classes" if self.library == "keras_cv" else "labels"

        def prepare(images: tf.Tensor, targets: Mapping[str, tf.Tensor]) -> tuple[Any, dict[str, tf.Tensor]]:
            return self.preprocess(images), {"boxes": targets["boxes"], classes: targets["classes"]}

        return data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def network(self) -> keras.Model:
        """The model to save: the same layers without the class of the library and without an optimizer."""
        return keras.Model(self.model.inputs, self.model.outputs, name="network")

    def predictor(self, image_size: int) -> keras.Model:
        """A model with the same weights that maps pixels to decoded boxes after non-maximum suppression.

        Its outputs are "boxes" `(N, 100, 4)`, "scores" and "classes" `(N, 100)`, and "count" `(N,)`, the
        number of detections among the 100.
        """
        inputs = keras.Input((image_size, image_size, 3), name="image")
        images = self.preprocess(inputs)
        outputs = _Decode(self.model, name="decode", dtype="float32")(images)
        return keras.Model(inputs, outputs, name="detector")


class _Decode(keras.layers.Layer):
    """The decoding of a detector as a layer of a graph."""

    def __init__(self, detector: keras.Model, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.detector = detector

    def call(self, images: Any) -> dict[str, Any]:
        found = decode(self.detector, images)
        return {
            "boxes": found["boxes"],
            "scores": found["confidence"],
            "classes": found["classes" if "classes" in found else "labels"],
            "count": found["num_detections"],
        }

    def compute_output_spec(self, images: Any) -> dict[str, Any]:
        shapes = {"boxes": (None, 100, 4), "scores": (None, 100), "classes": (None, 100), "count": (None,)}
        return {name: keras.KerasTensor(shape, "float32") for name, shape in shapes.items()}


@keras.saving.register_keras_serializable("keras_das_examples")
class Suppression(keras.layers.Layer):
    """Non-maximum suppression for each class, by TensorFlow's operation.

    The layer of KerasHub 0.32 does not support unknown batch sizes, which exports need, and suppresses boxes
    across classes.

    Args:
        threshold: The lowest score of a detection.
        overlap: The largest IoU of two detections of one class.
        count: The largest number of detections in an image.
    """

    bounding_box_format = FORMAT

    def __init__(
        self, threshold: float = 0.05, overlap: float = 0.5, count: int = 100, **kwargs: Any
    ) -> None:
        """Keep the arguments."""
        super().__init__(**kwargs)
        self.threshold, self.overlap, self.count = threshold, overlap, count

    def call(
        self, boxes: tf.Tensor, logits: tf.Tensor, images: Any = None, image_shape: Any = None
    ) -> dict[str, tf.Tensor]:
        """Select from `boxes` `(N, M, 4)` by their `logits` `(N, M, classes)`."""
        # It expects corners as (y, x), but the IoU does not depend on the order of the axes.
        found = tf.image.combined_non_max_suppression(
            tf.cast(boxes, "float32")[:, :, None],
            tf.sigmoid(tf.cast(logits, "float32")),
            max_output_size_per_class=self.count,
            max_total_size=self.count,
            iou_threshold=self.overlap,
            score_threshold=self.threshold,
            clip_boxes=False,
        )
        boxes, scores, classes, count = found
        return {"boxes": boxes, "confidence": scores, "classes": classes, "num_detections": count}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        settings = {"threshold": self.threshold, "overlap": self.overlap, "count": self.count}
        return {**super().get_config(), **settings}


def build(
    library: str,
    backbone: str,
    image_size: int,
    class_count: int,
    attach: Callable[[keras.Model], keras.Model] | None = None,
    weights: str = "none",
    head_layers: int = 0,
) -> Detector:
    """A RetinaNet on `backbone`: `resnet18`, `resnet50`, or a preset or folder of the library.

    Args:
        library: "keras_cv" or "keras_hub".
        backbone: Its name.
        image_size: Side of the square images.
        class_count: Number of classes.
        attach: Attaches gates to the backbone.
        weights: "none" (random weights), "preset" (those of the backbone's preset), or the path of a
            classifier of `examples/classify.py` with the same backbone, whose weights are copied.
        head_layers: Convolutions of each head before the last; 0 selects the library's default.
    """
    if library not in LIBRARIES:
        raise UserError(f"--library must be one of {', '.join(LIBRARIES)}, not {library!r}")
    found = _backbone(library, backbone, image_size, weights == "preset")
    model = found.model
    if weights not in ("none", "preset"):
        _load_backbone(model, Path(weights))
    if attach is not None:
        model = attach(model)
    build_model = {"keras_cv": _keras_cv, "keras_hub": _keras_hub}[library]
    return Detector(build_model(model, image_size, class_count, head_layers), library, found.preprocess)


def _backbone(library: str, name: str, image_size: int, pretrained: bool) -> backbones.Backbone:
    if name not in RESNETS:
        return backbones.build(f"{library}:{name}", image_size, pretrained)
    if pretrained:
        raise UserError(f"--weights preset requires a preset or a preset folder as --backbone, not {name}")
    block, blocks = RESNETS[name]
    if library == "keras_hub":
        models = backbones.import_library("keras_hub", "hub").models
        model = models.ResNetBackbone([64], [7], _FILTERS, blocks, _STRIDES, block)
        return backbones.Backbone(model, keras.layers.Rescaling(1 / 127.5, -1))
    models = backbones.import_library("keras_cv", "cv").models
    model = models.ResNetBackbone(
        stackwise_filters=_FILTERS,
        stackwise_blocks=blocks,
        stackwise_strides=_STRIDES,
        include_rescaling=True,
        block_type="block" if block == "bottleneck_block" else block,
    )
    return backbones.Backbone(model, lambda pixels: pixels)


def _load_backbone(model: keras.Model, path: Path) -> None:
    """Copy the backbone's weights, except those of gates, from the `.keras` file of a classifier."""
    wanted = {layer.name: layer for layer in model.layers if layer.weights}
    try:
        classifier = keras.models.load_model(path, compile=False)
        models = [layer for layer in classifier.layers if isinstance(layer, keras.Model)]
        source = next(each for each in models if wanted.keys() <= {layer.name for layer in each.layers})
        for name, layer in wanted.items():
            layer.set_weights(source.get_layer(name).get_weights())
    except StopIteration as error:
        raise UserError(f"--weights: {path} does not contain the layers of {model.name}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--weights: {path} does not fit the backbone: {first_line(error)}") from error


def _keras_cv(backbone: keras.Model, image_size: int, class_count: int, head_layers: int) -> keras.Model:
    import keras_cv

    if head_layers:
        raise UserError("--head-layers requires --library keras_hub")
    return keras_cv.models.RetinaNet(
        backbone=backbone,
        num_classes=class_count,
        bounding_box_format=FORMAT,
        prediction_decoder=Suppression(),
    )


def _keras_hub(backbone: keras.Model, image_size: int, class_count: int, head_layers: int) -> keras.Model:
    import keras_hub

    pyramid = keras_hub.models.RetinaNetBackbone(
        image_encoder=backbone,
        min_level=3,
        max_level=7,
        use_p5=True,
        image_shape=(image_size, image_size, 3),
    )
    model = keras_hub.models.RetinaNetObjectDetector(
        backbone=pyramid,
        num_classes=class_count,
        bounding_box_format=FORMAT,
        pre_logits_num_conv_layers=head_layers or 4,
        prediction_decoder=Suppression(),
    )
    _initialize_heads(model)
    return model


def _initialize_heads(model: keras.Model) -> None:
    """Initialize KerasHub's heads as in the paper: kernels of deviation 0.01, the prior as class bias.

    KerasHub 0.32 has no argument for this. It draws kernels of deviation 0.05, which makes the first scores
    arbitrary, and applies the prior to the head of the boxes.
    """
    for head in (model.classification_head, model.box_head):
        for layer in (*head.conv_layers, head.prediction_layer):
            layer.kernel.assign(keras.random.normal(layer.kernel.shape, stddev=0.01))
            layer.bias.assign(keras.ops.zeros(layer.bias.shape))
    bias = model.classification_head.prediction_layer.bias
    bias.assign(keras.ops.full(bias.shape, _PRIOR_BIAS))


def compile_model(detector: Detector, optimizer: keras.optimizers.Optimizer) -> None:
    """Compile with focal loss for classes and the library's loss for boxes, without XLA.

    TensorFlow's non-maximum suppression, which scoring uses, does not compile under XLA.
    """
    # KerasHub encodes boxes without variances, so their differences are small: with its default, Huber's
    # loss, all are in the quadratic part with small gradients. Its presets were trained with L1.
    losses: dict[str, Any] = {
        "box_loss": keras.losses.MeanAbsoluteError(reduction="sum"),
        "classification_loss": "auto",
    }
    if detector.library == "keras_cv":
        losses = {"box_loss": "smoothl1", "classification_loss": "focal"}
    detector.model.compile(optimizer=optimizer, jit_compile=False, **losses)
