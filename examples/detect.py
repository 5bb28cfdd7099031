"""Train a RetinaNet of KerasCV or KerasHub for object detection, with or without DAS gates.

    python examples/detect.py --backbone resnet18 --attention das --data trees
    python examples/detect.py --help

`train` runs the script as a function and returns the contents of `results.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make `examples` and an uninstalled keras_das importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import examples

    examples.require(
        "examples", "filelock", "matplotlib", "PIL", "platformdirs", "pycocotools", "tensorboard"
    )
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

from examples import backbones, common, experiment, options, training
from examples.common import UserError
from examples.data import pipeline
from examples.detection import batches, coco_metrics, data, detectors, pictures, splits

Predict = Callable[[tf.Tensor], dict[str, tf.Tensor]]
"""Maps a batch of pixels to decoded boxes."""


@dataclasses.dataclass(kw_only=True)
class Config(experiment.Config):
    """The arguments of a run; the defaults train the demonstration on `trees`."""

    image_size: int = 256
    augment: str = "on"
    library: str = "keras_hub"
    backbone: str = "resnet18"
    head_layers: int = 0
    epochs: int = 12
    batch_size: int = 8
    learning_rate: float = 5e-4
    weight_decay: float = 1e-3
    clip_norm: float = 10.0
    score_every: int = 4


RECIPES: dict[str, dict[str, Any]] = {
    # The usual schedule of twelve epochs, as the paper uses for a RetinaNet on a ResNet-50.
    "coco": {
        "data": "tfds:coco/2017",
        "image_size": 1024,
        "backbone": "resnet_50_imagenet",
        "weights": "preset",
        "norm_momentum": 0.99,
        "epochs": 12,
        "batch_size": 16,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "schedule": "steps",
        "weight_decay": 1e-3,  # decoupled from the gradient; as part of it, momentum multiplies 1e-4 by ten
        "clip_norm": 10.0,
        "das": experiment.PAPER_OFFSETS,
    },
}
"""The usual arguments for COCO, with a square of a multiple of 128 pixels instead of 800x1333."""

CHOICES: dict[str, Collection[str]] = {
    **experiment.CHOICES,
    "augment": ("on", "off"),
    "library": detectors.LIBRARIES,
}
HELP = {
    **experiment.HELP,
    "data": "trees (tiles of aerial photographs from PyPI), voc:FOLDER, coco:ANNOTATIONS.json,IMAGES_FOLDER "
    "or tfds:NAME",
    "image_size": "side of the square that images are scaled to fit into, a multiple of 128",
    "augment": "random flips, scales and crops of images and boxes",
    "library": "library of the RetinaNet",
    "backbone": "resnet18, resnet50, or a preset or preset folder of the library",
    "head_layers": "convolutions of each head before the last one (keras_hub only); 0: the library's default",
    "weights": "none (train from scratch), preset, or a .keras file of a classifier on the same backbone",
    "clip_norm": "clip gradients to this global norm; 0: no clipping",
    "score_every": "compute COCO metrics on the validation split and draw pictures every this many epochs",
    "output": "folder of the results (default: runs/DATA-LIBRARY-BACKBONE-ATTENTION)",
    "export": "write a SavedModel that maps pixels to boxes to this folder",
}
INTERFACE = options.Interface(
    "detect", "Train an object detector with DAS gates.", Config, HELP, CHOICES, RECIPES
)


def train(config: Config) -> dict[str, Any]:
    """Run `config` from data to saved model, and return all figures of `results.json`."""
    name, *_ = config.data.split(",")
    config = experiment.with_output(config, name, config.library, config.backbone, config.attention)
    _check(config)
    run = experiment.Run(config)
    found = data.load(config.data, config.seed, config.data_dir)
    for name, split in found.splits.items():
        boxes = sum(len(truth.boxes) for truth in split.truths)
        print(f"{name}: {len(split.truths)} images, {boxes} boxes, {split.dropped} dropped", flush=True)
    steps = max(1, len(found.splits["train"].truths) // config.batch_size)
    with training.dtype_policy(config.mixed_precision):
        with run.strategy.scope():
            detector = build_detector(config, len(found.class_names))
            compile_detector(detector, config, steps)
        run.prepare_backup(found.class_names, "library")
        predictor = detector.predictor(config.image_size)
        # One graph for all uses. With `predict_on_batch`, every replica would predict the whole batch.
        predict = tf.function(lambda images: predictor(images, training=False), reduce_retracing=True)
        timer, monitors = _fit(detector, predict, found, run)
        print("evaluating on the test split", flush=True)
        detections = detect(predict, found.splits["test"], config)
    results = {
        "arguments": dataclasses.asdict(config),
        "class_names": list(found.class_names),
        "images": {name: len(split.truths) for name, split in found.splits.items()},
        "parameters": detector.model.count_params(),
        **timer.figures(),
        **experiment.gate_figures(monitors),
        **coco_metrics.score(truths_of(found.splits["test"]), detections, found.class_names),
        "versions": training.versions(config.library),
    }
    run.finish(results, lambda: _save(detector, predictor, predict, detections, found, run))
    return results


def _check(config: Config) -> None:
    INTERFACE.check(config)
    if config.image_size % 128:
        raise UserError(f"--image-size must be a multiple of 128, not {config.image_size}")
    if config.score_every < 1:
        raise UserError(f"--score-every must be at least 1, not {config.score_every}")


def build_detector(config: Config, class_count: int) -> detectors.Detector:
    """Builds the detector of `config`."""
    attach = None
    if config.attention == "das":
        trained = config.weights != "none"
        identity = trained if config.identity_init == "auto" else config.identity_init == "on"
        attach = functools.partial(backbones.attach_gates, identity_init=identity, das=config.das)
    detector = detectors.build(
        config.library,
        config.backbone,
        config.image_size,
        class_count,
        attach,
        config.weights,
        config.head_layers,
    )
    for layer in training.batch_norms(detector.model):
        layer.momentum = config.norm_momentum
    return detector


def compile_detector(detector: detectors.Detector, config: Config, steps: int) -> None:
    """Compiles the detector with the optimizer of `config`, for epochs of `steps` steps."""
    variables, gates = detector.model.trainable_variables, experiment.gates_of(detector.model)
    detectors.compile_model(detector, training.make_optimizer(config, steps, variables, gates))


def _fit(
    detector: detectors.Detector, predict: Predict, found: data.DetectionData, run: experiment.Run
) -> tuple[training.StepTimer, experiment.Monitors]:
    config, records = run.config, run.records()
    if run.chief:
        # The scores precede the callbacks that record them.
        records.insert(0, _scorer(detector, found, config))
        records.append(_pictures(predict, found, config, run.output / "logs"))
    clock, timer = pipeline.EpochClock(config.seed), training.StepTimer()
    train_data = batches.training_batches(
        found.splits["train"], config.image_size, config.batch_size, clock, config.augment == "on"
    )
    train_data = detector.batches(train_data)
    watched = _first(found.splits["val"], 8)
    images, _ = next(iter(batches.evaluation_batches(watched, config.image_size, 8)))
    monitors = run.monitors(detector.model, detector.preprocess(images))
    with training.explaining(found, run.backup):
        if config.strategy == "none":
            training.make_loss_variables(detector.model, train_data)
        detector.model.fit(
            train_data,
            epochs=config.epochs,
            shuffle=False,  # the pipeline shuffles
            verbose=training.verbosity(config.progress),
            callbacks=[clock, timer, *records, *monitors, training.Backup(run.backup, writes=run.chief)],
        )
    return timer, monitors


def _scorer(
    detector: detectors.Detector, found: data.DetectionData, config: Config
) -> coco_metrics.CocoMetrics:
    val_data = batches.scored_batches(found.splits["val"], config.image_size, config.batch_size)
    return coco_metrics.CocoMetrics(
        detector.batches(val_data), detectors.FORMAT, found.class_names, config.score_every
    )


def truths_of(split: data.Split) -> list[coco_metrics.Boxes]:
    """The boxes of every image of a split, in pixels of the original images."""
    return [
        coco_metrics.Boxes(truth.image_id, truth.boxes, truth.labels, crowd=truth.crowd)
        for truth in split.truths
    ]


def detect(predict: Predict, split: data.Split, config: Config) -> list[coco_metrics.Boxes]:
    """Detections in the images of a split, in pixels of the original images."""
    found = []
    for images, indices in batches.evaluation_batches(split, config.image_size, config.batch_size):
        predicted = {name: np.asarray(value) for name, value in predict(images).items()}
        for number, index in enumerate(indices.numpy().tolist()):
            truth, count = split.truths[index], int(predicted["count"][number])
            scale = batches.resize_scale(truth.height, truth.width, config.image_size)
            boxes = predicted["boxes"][number, :count] / scale
            boxes = np.clip(boxes, 0, [truth.width, truth.height] * 2)
            labels = predicted["classes"][number, :count].astype(int)
            found.append(
                coco_metrics.Boxes(truth.image_id, boxes, labels, predicted["scores"][number, :count])
            )
    return found


def _pictures(predict: Predict, found: data.DetectionData, config: Config, logs: Path) -> pictures.Pictures:
    split = _first(found.splits["val"], 4)

    def draw(file: Any) -> None:
        _draw(detect(predict, split, config), split, found.class_names, file)

    return pictures.Pictures(logs, draw, config.score_every)


def _first(split: data.Split, count: int) -> data.Split:
    """A few evenly spaced images of a split."""
    chosen = np.unique(np.linspace(0, len(split.truths) - 1, count).astype(int))
    return splits.Subset(split, chosen.tolist())


def _draw(detections: list[coco_metrics.Boxes], split: data.Split, class_names: Any, file: Any) -> None:
    images = [split.image(tf.constant(number)).numpy() for number in range(len(split.truths))]
    pictures.draw_sheet(images, truths_of(split), detections, class_names, file)


def _save(
    detector: detectors.Detector,
    predictor: keras.Model,
    predict: Predict,
    detections: list[coco_metrics.Boxes],
    found: data.DetectionData,
    run: experiment.Run,
) -> None:
    """Write the files of a finished run besides `results.json`."""
    with run.replacing("model.weights.h5") as path:
        detector.network().save_weights(path)
    run.export(predictor)
    with run.replacing("detections.json") as path:
        path.write_text(json.dumps(coco_metrics.coco_results(detections, found.category_ids)) + "\n")
    with run.replacing("sheet.png") as path:
        split = _first(found.splits["test"], 8)
        _draw(detect(predict, split, run.config), split, found.class_names, path)


def _report(config: Config) -> None:
    results = train(config)
    print(
        f"AP {results['AP']:.3f}, AP50 {results['AP50']:.3f} on {results['images']['test']} images, "
        f"trained in {results['train_seconds']:.0f} s; results in {results['arguments']['output']}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    config, debug = INTERFACE.parse(arguments)
    return common.run("detect", lambda: _report(config), debug)


if __name__ == "__main__":
    sys.exit(main())
