"""Train a RetinaNet of KerasCV or KerasHub for object detection, with or without DAS gates.

    python examples/detect.py --backbone resnet18 --attention das --data trees
    python examples/detect.py --help

`train` runs the script as a function and returns the contents of `results.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Collection, Mapping
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

import keras_das
from examples import common, options, training
from examples.common import UserError
from examples.data import pipeline
from examples.detection import batches, coco_metrics, data, detectors, pictures, splits


@dataclasses.dataclass
class Config:
    """The arguments of a run; the defaults train the demonstration on `trees`."""

    data: str = "trees"
    data_dir: str | None = None
    image_size: int = 256
    augment: str = "on"
    library: str = "keras_hub"
    backbone: str = "resnet18"
    head_layers: int = 0
    weights: str = "none"
    attention: str = "das"
    identity_init: str = "auto"
    das: dict[str, Any] = dataclasses.field(default_factory=dict)
    norm_momentum: float = 0.9
    epochs: int = 12
    batch_size: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    weight_decay: float = 1e-3
    clip_norm: float = 10.0
    mixed_precision: str = "none"
    strategy: str = "none"
    score_every: int = 4
    seed: int = 0
    deterministic: bool = False
    output: str | None = None
    resume: str | None = None
    export: str | None = None
    progress: str = "auto"


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
    },
}
"""The usual arguments for COCO, with a square of a multiple of 128 pixels instead of 800x1333."""

CHOICES: dict[str, Collection[str]] = {
    "augment": ("on", "off"),
    "library": detectors.LIBRARIES,
    "attention": ("none", "das"),
    "identity_init": ("auto", "on", "off"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "steps", "constant"),
    "mixed_precision": ("none", "mixed_float16", "mixed_bfloat16"),
    "strategy": training.STRATEGIES,
    "progress": ("auto", "bar", "lines", "none"),
}
HELP = {
    "data": "trees (tiles of aerial photographs from PyPI), voc:FOLDER, coco:ANNOTATIONS.json,IMAGES_FOLDER "
    "or tfds:NAME",
    "data_dir": "folder of TensorFlow Datasets' files",
    "image_size": "side of the square that images are scaled to fit into, a multiple of 128",
    "augment": "random flips, scales and crops of images and boxes",
    "library": "library of the RetinaNet",
    "backbone": "resnet18, resnet50, or a preset or preset folder of the library",
    "head_layers": "convolutions of each head before the last one (keras_hub only); 0: the library's default",
    "weights": "none (train from scratch), preset, or a .keras file of a classifier on the same backbone",
    "attention": "DAS gates after each stage, or none",
    "identity_init": "start gates at exactly 1; auto: only with trained weights",
    "norm_momentum": "momentum of the moving averages of batch normalization",
    "optimizer": "AdamW, or SGD with momentum 0.9",
    "schedule": "schedule of the learning rate; steps: multiply by 0.1 after 30, 60 and 90 %% of the epochs",
    "warmup_epochs": "epochs of linear warm-up of the cosine schedule",
    "clip_norm": "clip gradients to this global norm; 0: no clipping",
    "mixed_precision": "Keras dtype policy",
    "strategy": training.STRATEGY_HELP,
    "score_every": "compute COCO metrics on the validation split and draw pictures every this many epochs",
    "deterministic": "use deterministic operations of TensorFlow, which are slower",
    "output": "folder of the results (default: runs/DATA-LIBRARY-BACKBONE-ATTENTION)",
    "resume": "folder of the training state (OUTPUT/backup) of an interrupted run to resume",
    "export": "write a SavedModel that maps pixels to boxes to this folder",
    "progress": "progress bar, one line per epoch, or none; auto: a bar on a terminal",
}
INTERFACE = options.Interface(
    "detect", "Train an object detector with DAS gates.", Config, HELP, CHOICES, RECIPES
)


def train(config: Config) -> dict[str, Any]:
    """Run `config` from data to saved model, and return all figures of `results.json`."""
    config = dataclasses.replace(config, output=config.output or _default_output(config))
    _check(config)
    strategy = training.make_strategy(config.strategy, config.batch_size)
    chief = training.is_chief(strategy)
    output = Path(config.output)
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    found = data.load(config.data, config.seed, config.data_dir)
    for name, split in found.splits.items():
        boxes = sum(len(truth.boxes) for truth in split.truths)
        print(f"{name}: {len(split.truths)} images, {boxes} boxes, {split.dropped} dropped", flush=True)
    steps = max(1, len(found.splits["train"].truths) // config.batch_size)
    with training.dtype_policy(config.mixed_precision):
        with strategy.scope():
            detector = build_detector(config, len(found.class_names))
            optimizer = training.make_optimizer(config, steps, detector.model.trainable_variables)
            detectors.compile_model(detector, optimizer)
        backup = Path(config.resume or output / "backup")
        if chief:
            training.prepare_backup(backup, bool(config.resume), _identity(config, found))
        training.wait_for_all(strategy)
        timer = _fit(detector, found, config, output, backup, chief)
        print("evaluating on the test split", flush=True)
        detections = detect(detector.predictor(config.image_size), found.splits["test"], config)
    results = {
        "arguments": dataclasses.asdict(config),
        "class_names": list(found.class_names),
        "images": {name: len(split.truths) for name, split in found.splits.items()},
        "parameters": detector.model.count_params(),
        **timer.figures(),
        **coco_metrics.score(truths_of(found.splits["test"]), detections, found.class_names),
        "versions": training.versions(config.library),
    }
    if chief:
        results["history"] = training.read_history(output / "history.csv")
        _save(detector, results, detections, found, config, backup)
        common.remove(backup)
    return results


def _default_output(config: Config) -> str:
    parts = (config.data, config.library, config.backbone, config.attention)
    return str(Path("runs") / "-".join(Path(part.split(",")[0].replace(":", "-")).name for part in parts))


def _check(config: Config) -> None:
    INTERFACE.check(config)
    if config.image_size % 128:
        raise UserError(f"--image-size must be a multiple of 128, not {config.image_size}")
    if config.score_every < 1:
        raise UserError(f"--score-every must be at least 1, not {config.score_every}")


def _identity(config: Config, found: data.DetectionData) -> dict[str, Any]:
    """Arguments that must not change when a run is resumed."""
    names = (
        "library",
        "backbone",
        "attention",
        "das",
        "data",
        "image_size",
        "batch_size",
        "optimizer",
        "seed",
    )
    return {name: getattr(config, name) for name in names} | {"class_names": list(found.class_names)}


def build_detector(config: Config, class_count: int) -> detectors.Detector:
    """Builds the detector of `config`."""
    attach = None
    if config.attention == "das":
        trained = config.weights != "none"
        identity = trained if config.identity_init == "auto" else config.identity_init == "on"
        attach = detectors.attach_das(identity, config.das)
    detector = detectors.build(
        config.library,
        config.backbone,
        config.image_size,
        class_count,
        attach,
        config.weights,
        config.head_layers,
    )
    for layer in detector.model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = config.norm_momentum
    return detector


def _fit(
    detector: detectors.Detector,
    found: data.DetectionData,
    config: Config,
    output: Path,
    backup: Path,
    chief: bool,
) -> training.StepTimer:
    records: list[keras.callbacks.Callback] = []
    if chief:
        records = [
            _scorer(detector, found, config),  # before the callbacks that record its figures
            *training.make_records(output, bool(config.resume)),
            _pictures(detector, found, config, output / "logs"),
        ]
    clock, timer = pipeline.EpochClock(config.seed), training.StepTimer()
    train_data = batches.training_batches(
        found.splits["train"], config.image_size, config.batch_size, clock, config.augment == "on"
    )
    train_data = detector.batches(train_data)
    with training.explaining(found, backup):
        if config.strategy == "none":
            training.make_loss_variables(detector.model, train_data)
        detector.model.fit(
            train_data,
            epochs=config.epochs,
            shuffle=False,  # the pipeline shuffles
            verbose=training.verbosity(config.progress),
            callbacks=[clock, timer, *records, training.Backup(backup, writes=chief)],
        )
    return timer


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


def detect(predictor: keras.Model, split: data.Split, config: Config) -> list[coco_metrics.Boxes]:
    """Detections in the images of a split, in pixels of the original images."""
    # Not `predict_on_batch`: under a strategy, every replica would predict the whole batch.
    forward = tf.function(lambda images: predictor(images, training=False), reduce_retracing=True)
    found = []
    for images, indices in batches.evaluation_batches(split, config.image_size, config.batch_size):
        predicted = {name: np.asarray(value) for name, value in forward(images).items()}
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


def _pictures(
    detector: detectors.Detector, found: data.DetectionData, config: Config, logs: Path
) -> pictures.Pictures:
    predictor, split = detector.predictor(config.image_size), _first(found.splits["val"], 4)

    def draw(file: Any) -> None:
        _draw(detect(predictor, split, config), split, found.class_names, file)

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
    results: Mapping[str, Any],
    detections: list[coco_metrics.Boxes],
    found: data.DetectionData,
    config: Config,
    backup: Path,
) -> None:
    """Write the results of a finished run; until then, `backup` keeps its training state."""
    output = Path(config.output)
    try:
        with common.replacing(output / "model.weights.h5") as path:
            detector.network().save_weights(path)
        predictor = detector.predictor(config.image_size)
        if config.export:
            with common.naming_full_disk(Path(config.export)):
                keras_das.export(predictor, config.export)
        with common.replacing(output / "detections.json") as path:
            path.write_text(json.dumps(coco_metrics.coco_results(detections, found.category_ids)) + "\n")
        with common.replacing(output / "sheet.png") as path:
            split = _first(found.splits["test"], 8)
            _draw(detect(predictor, split, config), split, found.class_names, path)
        with common.replacing(output / "results.json") as path:
            path.write_text(json.dumps(results, indent=2) + "\n")
    except common.RunError as error:
        raise common.RunError(
            f"{error}; training is not lost: free disk space and repeat with --resume {backup}"
        ) from error


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
