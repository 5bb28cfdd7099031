"""RetinaNets of KerasCV and KerasHub on a ResNet, with or without gates, behind one face."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_das
from examples import backbones
from examples.common import UserError, first_line
from examples.detection.coco_metrics import decode

LIBRARIES = ("keras_cv", "keras_hub")
FORMAT = "xyxy"
"""Of all boxes, in pixels."""
RESNETS = {"resnet18": ("basic_block", [2, 2, 2, 2]), "resnet50": ("bottleneck_block", [3, 4, 6, 3])}
_FILTERS, _STRIDES = [64, 128, 256, 512], [1, 2, 2, 2]
PRIOR = 0.01
"""The score that all boxes start with: Lin et al., arXiv 1708.02002, section 4.1."""
_PRIOR_BIAS = -math.log((1 - PRIOR) / PRIOR)


@dataclasses.dataclass(frozen=True)
class Detector:
    """A RetinaNet of one of the libraries."""

    model: keras.Model
    library: str
    preprocess: Callable[[Any], Any]
    """From pixels of 0..255 to what the model takes."""

    def batches(self, data: tf.data.Dataset) -> tf.data.Dataset:
        """What `fit` takes, of batches of pixels and of padded "boxes" and "classes"."""
        classes = "classes" if self.library == "keras_cv" else "labels"

        def prepare(images: tf.Tensor, targets: Mapping[str, tf.Tensor]) -> tuple[Any, dict[str, tf.Tensor]]:
            return self.preprocess(images), {"boxes": targets["boxes"], classes: targets["classes"]}

        return data.map(prepare, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def network(self) -> keras.Model:
        """The same layers without the library's class around them and without an optimizer: what to save."""
        return keras.Model(self.model.inputs, self.model.outputs, name="network")

    def predictor(self, image_size: int) -> keras.Model:
        """A model of the same weights, from pixels to boxes: decoded, and after suppression of doubles.

        Its outputs are "boxes" `(N, 100, 4)`, "scores" and "classes" `(N, 100)`, and "count" `(N,)`: how many
        of the 100 are detections.
        """
        inputs = keras.Input((image_size, image_size, 3), name="image")
        images = self.preprocess(inputs)
        outputs = _Decode(self.model, name="decode")(images)
        return keras.Model(inputs, outputs, name="detector")


class _Decode(keras.layers.Layer):
    """A detector with its own decoding as a layer of a graph."""

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
    """The best boxes of each class that do not cover one another: TensorFlow's own operation.

    KerasHub 0.32's layer for it takes no batch of unknown size, which an export has, and lets a box of one
    class suppress those of another.

    Args:
        threshold: The least score of a detection.
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
        """Choose among `boxes` `(N, M, 4)` by their `logits` `(N, M, classes)`."""
        # It names corners (y, x), but an IoU is the same with the axes in the other order.
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
    """A RetinaNet on `backbone`: `resnet18`, `resnet50`, or a preset or folder of the library's.

    Args:
        library: "keras_cv" or "keras_hub".
        backbone: Its name.
        image_size: Side of the square images.
        class_count: How many classes there are.
        attach: Puts gates on the backbone.
        weights: "none" (random weights), "preset" (those of the backbone's preset), or the path of a
            classifier of `examples/classify.py` on the same backbone, whose backbone's weights are taken.
        head_layers: Convolutions of each head before its last; 0 leaves it to the library.
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
        raise UserError(f"--weights preset: {name} is built here; name a preset or a folder as --backbone")
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
    """Take the weights of the backbone in a classifier's `.keras` file, those without attention."""
    try:
        classifier = keras.models.load_model(path, compile=False)
        source = next(layer for layer in classifier.layers if isinstance(layer, type(model)))
        model.set_weights(source.get_weights())
    except StopIteration as error:
        raise UserError(f"--weights: {path} has no {type(model).__name__} in it") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--weights: {path} does not fit the backbone: {first_line(error)}") from error


def _keras_cv(backbone: keras.Model, image_size: int, class_count: int, head_layers: int) -> keras.Model:
    import keras_cv

    if head_layers:
        raise UserError("--head-layers goes with --library keras_hub only")
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
    """Start KerasHub's heads as the paper does: kernels of deviation 0.01, the prior as the classes' bias.

    KerasHub 0.32 has no argument for it. It draws kernels of deviation 0.05, from which the first scores are
    anything, and gives the prior to the head of the boxes.
    """
    for head in (model.classification_head, model.box_head):
        for layer in (*head.conv_layers, head.prediction_layer):
            layer.kernel.assign(keras.random.normal(layer.kernel.shape, stddev=0.01))
            layer.bias.assign(keras.ops.zeros(layer.bias.shape))
    bias = model.classification_head.prediction_layer.bias
    bias.assign(keras.ops.full(bias.shape, _PRIOR_BIAS))


def compile_model(detector: Detector, optimizer: keras.optimizers.Optimizer) -> None:
    """Focal loss of the classes and the libraries' own way with boxes; without XLA.

    TensorFlow's suppression of double boxes, which scoring takes, does not compile under XLA.
    """
    # KerasHub encodes boxes without variances: their differences are so small that of its own choice, Huber's
    # loss, all would lie in the flat part. L1 is what the weights of its presets were trained with.
    losses: dict[str, Any] = {
        "box_loss": keras.losses.MeanAbsoluteError(reduction="sum"),
        "classification_loss": "auto",
    }
    if detector.library == "keras_cv":
        losses = {"box_loss": "smoothl1", "classification_loss": "focal"}
    detector.model.compile(optimizer=optimizer, jit_compile=False, **losses)


def attach_das(identity_init: bool, das: Mapping[str, Any]) -> Callable[[keras.Model], keras.Model]:
    """An argument `attach` of `build`."""

    def attach(backbone: keras.Model) -> keras.Model:
        try:
            return keras_das.attach_das(backbone, identity_init=identity_init, **das)
        except (TypeError, ValueError) as error:
            raise UserError(f"cannot attach gates: {first_line(error)}") from error

    return attach
