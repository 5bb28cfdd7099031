"""Train or fine-tune an image classifier, with or without DAS gates.

    python examples/classify.py --backbone resnet50 --attention das --data trees
    python examples/classify.py --help

`train` runs the script as a function and returns the contents of `results.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make `examples` and an uninstalled keras_das importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import examples

    examples.require("examples", "filelock", "matplotlib", "PIL", "platformdirs", "tensorboard")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import keras_das
from examples import backbones, common, data, experiment, figures, options, training
from examples.common import UserError
from examples.data import pipeline
from examples.data.augmentation import augmentation
from examples.scoring import confusion_matrix, scores


@dataclasses.dataclass(kw_only=True)
class Config(experiment.Config):
    """The arguments of a run; the defaults train the demonstration on `trees`."""

    data_share: float = 1.0
    image_size: int = 64
    augment: str = "auto"
    backbone: str = "resnet50"
    small_stem: bool = False
    train: str = "all"
    freeze_batch_norm: bool = False
    dropout: float = 0.0
    epochs: int = 6
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    jit: str = "auto"
    baseline: str | None = None


# As far as known, the paper (arXiv 2311.12091) uses SGD at a rate of 0.1 with momentum 0.9 and weight decay
# 1e-4: on ImageNet batches of 256 for 100 epochs, with a tenth of the rate after 30, 60 and 90; on Stanford
# Dogs batches of 32 and a cosine schedule. The number of epochs on Stanford Dogs is our choice, and so is
# augmentation by Keras layers instead of random crops and flips.
_PAPER: dict[str, Any] = {
    "backbone": "resnet50",
    "image_size": 224,
    "norm_momentum": 0.99,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    # Keras decouples weight decay from the gradient; as part of it, momentum multiplies 1e-4 by ten.
    "weight_decay": 1e-3,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "epochs": 100,
    "das": experiment.PAPER_OFFSETS,
}
RECIPES: dict[str, dict[str, Any]] = {
    "imagenet": {
        **_PAPER,
        "data": "tfds:imagenet2012",
        "augment": "zoom",
        "batch_size": 256,
        "schedule": "steps",
    },
    "stanford_dogs": {
        **_PAPER,
        "data": "tfds:stanford_dogs",
        "augment": "crop",
        "batch_size": 32,
        "schedule": "cosine",
    },
}
"""Common settings for the paper's data sets, not checked against its text.

Arguments on the command line override them."""


ATTENTIONS: dict[str, Callable[[backbones.Backbone, Config], keras.Model]] = {
    "none": lambda backbone, config: backbone.model,
    "das": lambda backbone, config: backbones.attach_gates(
        backbone.model, config.identity_init == "on", config.das, backbone.stages
    ),
}
"""Functions from a backbone to its features; comparisons with other modules can add their own."""

CHOICES: dict[str, Collection[str]] = {
    **experiment.CHOICES,
    "augment": ("auto", "none", "flip", "aerial", "crop", "zoom"),
    "attention": ATTENTIONS.keys(),
    "train": ("all", "gates"),
    "jit": ("auto", "on", "off"),
}


def train(config: Config) -> dict[str, Any]:
    """Run `config` from data to saved model, and return all figures of `results.json`."""
    config = experiment.with_output(config, config.data, config.backbone, config.attention)
    INTERFACE.check(config)
    run = experiment.Run(config)
    dataset = data.load(config.data, config.image_size, config.seed, config.data_dir, config.data_share)
    with training.dtype_policy(config.mixed_precision):
        with run.strategy.scope():
            model = build_model(config, dataset.class_names)
            _freeze(model, config)
            compile_model(model, config, dataset.splits["train"].count)
        run.prepare_backup(dataset.class_names, "small_stem", "train")
        before = {}
        if config.weights != "none" and not config.resume:
            start = _evaluate(model, dataset, config)
            before["test_accuracy_before"] = scores(start)["test_accuracy"]
        timer, monitors = _fit(model, dataset, run)
        print("evaluating on the test split", flush=True)
        confusion = _evaluate(model, dataset, config)
    results = {
        **_describe_run(config, model, dataset),
        **before,
        **timer.figures(),
        **experiment.gate_figures(monitors),
        **scores(confusion),
        "confusion_matrix": confusion.tolist(),
    }
    run.finish(results, lambda: _save(model, confusion, dataset, run))
    return results


# The model


def build_model(config: Config, class_names: tuple[str, ...]) -> keras.Model:
    """A classifier of pixels of 0..255: scaling, backbone, gates, average pooling and a softmax.

    With the same seed, backbone and head start from the same weights for every kind of attention. If
    `config.weights` is a file of the model without attention, attention is attached to the loaded model.
    """
    pretrained = config.weights in ("imagenet", "preset")
    file = None if pretrained or config.weights == "none" else Path(config.weights)
    source = None if file is None else _read(file)
    backbone = backbones.build(config.backbone, config.image_size, pretrained, config.small_stem)
    plain = _classifier(backbone.model, backbone, config, len(class_names))
    attach_to_file = (
        source is not None and config.attention != "none" and len(source.weights) == len(plain.weights)
    )
    if attach_to_file:
        _load(plain, file, source)
    if config.identity_init == "auto":
        gates = experiment.gates_of(source) if source else []
        at_one = pretrained or attach_to_file or any(gate.identity_init for gate in gates)
        config = dataclasses.replace(config, identity_init="on" if at_one else "off")
    features = ATTENTIONS[config.attention](backbone, config)
    model = _classifier(features, backbone, config, len(class_names))
    model.get_layer("classes").set_weights(plain.get_layer("classes").get_weights())
    if file is not None and not attach_to_file:
        _load(model, file, source)
    return model


def _classifier(
    features: keras.Model, backbone: backbones.Backbone, config: Config, classes: int
) -> keras.Model:
    for layer in training.batch_norms(features):
        layer.momentum = config.norm_momentum
    inputs = keras.Input((config.image_size, config.image_size, 3), name="image")
    x = features(backbone.preprocess(inputs))
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(config.dropout)(x)
    outputs = keras.layers.Dense(classes, "softmax", dtype="float32", name="classes")(x)
    return keras.Model(inputs, outputs, name="classifier")


def _freeze(model: keras.Model, config: Config) -> None:
    """Freezes weights according to `config`."""
    if config.train == "gates":
        if not experiment.gates_of(model):
            raise UserError("--train gates requires --attention das")
        keras_das.freeze_trunk(model)
    if config.freeze_batch_norm:
        for layer in training.batch_norms(model):
            layer.trainable = False


def _read(path: Path) -> keras.Model | None:
    """Returns the model of a `.keras` file, or `None` for a file that contains only weights."""
    if not path.is_file():
        raise UserError(f"--weights: no such file: {path} (other values: none, imagenet, preset)")
    if path.suffix != ".keras":
        return None
    try:
        return keras.models.load_model(path, compile=False)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--weights: cannot read {path}: {common.first_line(error)}") from error


def _load(model: keras.Model, path: Path, source: keras.Model | None) -> None:
    """Copies the weights of `source`, the model of the file, or of a file that contains only weights."""
    try:
        if source is not None:
            _check_class_count(path, source, model)
            model.set_weights(source.get_weights())
            _check_gates(path, source, model)
            return
        with warnings.catch_warnings():
            # Keras only warns about weights that the file lacks.
            warnings.simplefilter("error", UserWarning)
            model.load_weights(path)
    except (OSError, ValueError, TypeError, UserWarning) as error:
        raise UserError(f"--weights: {path} does not fit this model: {common.first_line(error)}") from error


def _check_class_count(path: Path, source: keras.Model, model: keras.Model) -> None:
    theirs, ours = source.output_shape[-1], model.output_shape[-1]
    if theirs != ours:
        raise UserError(f"--weights: {path} was trained for {theirs} classes, the data has {ours}")


def _check_gates(path: Path, source: keras.Model, model: keras.Model) -> None:
    """Checks that the gates of both models compute the same."""
    pairs = zip(experiment.gates_of(source), experiment.gates_of(model), strict=True)
    for theirs, ours in ((their.get_config(), our.get_config()) for their, our in pairs):
        for setting in ("identity_init", "identity_gain", "norm", "dilation_rate", "offset_scale"):
            if theirs[setting] != ours[setting]:
                raise UserError(
                    f"--weights: the gates of {path} have {setting}={theirs[setting]}, those of this model "
                    f"{ours[setting]}; pass --das {shlex.quote(f'{setting}={theirs[setting]}')}"
                )


def compile_model(model: keras.Model, config: Config, train_count: int) -> None:
    """Set optimizer, loss and accuracy for epochs of `train_count` images."""
    steps = max(1, train_count // config.batch_size)
    optimizer = training.make_optimizer(config, steps, model.trainable_variables, experiment.gates_of(model))
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        # Given by name, it would create its variables during the first step; see `make_optimizer`.
        metrics=[keras.metrics.CategoricalAccuracy("accuracy")],
        jit_compile={"auto": "auto", "on": True, "off": False}[config.jit],
    )


def _fit(
    model: keras.Model, dataset: pipeline.Dataset, run: experiment.Run
) -> tuple[training.StepTimer, experiment.Monitors]:
    config, records = run.config, run.records()
    clock, timer = pipeline.EpochClock(config.seed), training.StepTimer()
    classes, splits = len(dataset.class_names), dataset.splits
    layers = augmentation(config.augment, config.data)
    batches = pipeline.training_batches(splits["train"], classes, config.batch_size, clock, layers)
    with training.explaining(dataset, run.backup):
        monitors = run.monitors(model, _examples(dataset, 16)[0])
        model.fit(
            batches,
            validation_data=pipeline.evaluation_batches(splits["val"], classes, config.batch_size),
            epochs=config.epochs,
            shuffle=False,  # the pipeline shuffles
            verbose=training.verbosity(config.progress),
            callbacks=[
                clock,
                timer,
                # Before the backup: a run that ends in between leaves a row too many, trimmed later.
                *records,
                *monitors,
                training.Backup(run.backup, writes=run.chief),
            ],
        )
    return timer, monitors


# The results


def _evaluate(model: keras.Model, dataset: pipeline.Dataset, config: Config) -> np.ndarray:
    """The confusion matrix of the test split."""
    labels, predicted = predict(model, dataset.splits["test"], config.batch_size)
    return confusion_matrix(labels, predicted, len(dataset.class_names))


def predict(model: keras.Model, split: pipeline.Split, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted labels of a split, in order."""
    # Not `predict_on_batch`: under a strategy, every replica would predict the whole batch.
    forward = tf.function(lambda images: model(images, training=False), reduce_retracing=True)
    labels, predicted = [], []
    for images, targets in pipeline.evaluation_batches(split, model.output_shape[-1], batch_size):
        labels.append(np.argmax(targets, axis=-1))
        predicted.append(np.argmax(forward(images), axis=-1))
    return np.concatenate(labels), np.concatenate(predicted)


def _describe_run(config: Config, model: keras.Model, dataset: pipeline.Dataset) -> dict[str, Any]:
    gates = experiment.gates_of(model)
    return {
        "arguments": dataclasses.asdict(config),
        "class_names": list(dataset.class_names),
        "images": {name: split.count for name, split in dataset.splits.items()},
        "parameters": model.count_params(),
        "gates": len(gates),
        "gate_parameters": sum(gate.count_params() for gate in gates),
        "jit_compile": bool(model.jit_compile),
        "devices": [device.device_type for device in tf.config.list_logical_devices()],
        "versions": training.versions(),
    }


def _save(model: keras.Model, confusion: np.ndarray, dataset: pipeline.Dataset, run: experiment.Run) -> None:
    """Write the files of a finished run besides `results.json`."""
    with run.replacing("model.keras") as path:
        # The same layers without the state of the optimizer: a third of the size.
        keras.Model(model.inputs, model.outputs, name=model.name).save(path)
    run.export(model)
    with run.replacing("confusion_matrix.png") as path:
        figures.draw_confusion_matrix(confusion, dataset.class_names, path)
    if run.config.attention == "das":
        with run.replacing("gates.png") as path:
            figures.draw_gates(model, *_examples(dataset), path)


def _examples(dataset: pipeline.Dataset, count: int = 4) -> tuple[np.ndarray, list[str]]:
    """A few images of the test split, alternating between classes, and their class names."""
    shuffled = dataset.splits["test"].examples(tf.constant([0, 0], tf.int64))
    images, labels = next(iter(shuffled.batch(16 * count)))
    labels = labels.numpy()
    turn = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    chosen = np.lexsort((labels, turn))[:count]
    return images.numpy()[chosen], [dataset.class_names[label] for label in labels[chosen]]


# The command line


HELP = {
    **experiment.HELP,
    "data": "trees (aerial photographs from PyPI), folder:PATH (of class folders, or train, val and test of "
    "those) or tfds:NAME",
    "data_share": "share of the training and validation images to use, class by class (folders only)",
    "image_size": "side of the square images in pixels",
    "augment": "augmentation by Keras layers; auto: aerial for trees, crop for other data",
    "backbone": "resnet18, resnet20, resnet50, mobilenet_v2, keras_cv:PRESET_OR_FOLDER or "
    "keras_hub:PRESET_OR_FOLDER",
    "small_stem": "remove the stride of the first layer of resnet18, for images of about 32 pixels",
    "weights": "none (train from scratch), imagenet or preset (fine-tune), or a .weights.h5 or .keras file; "
    "gates can be attached to a .keras file of a model without gates",
    "train": "all weights, or only the gates and the head, with the trunk frozen",
    "freeze_batch_norm": "freeze statistics, scales and shifts of batch normalization",
    "baseline": "folder of another run whose test accuracy is printed for comparison",
    "jit": "compile with XLA; auto: the default of Keras",
    "output": "folder of the results (default: runs/DATA-BACKBONE-ATTENTION)",
    "export": "write a SavedModel to this folder",
}


INTERFACE = options.Interface(
    "classify", "Train an image classifier with DAS gates.", Config, HELP, CHOICES, RECIPES
)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Config, bool]:
    """Returns the configuration of a command line, and whether `--debug` is set."""
    return INTERFACE.parse(arguments)


def _report(config: Config) -> None:
    results = train(config)
    output = results["arguments"]["output"]
    print(
        f"test accuracy {results['test_accuracy']:.4f} on {results['images']['test']} images "
        f"(balanced {results['test_balanced_accuracy']:.4f}), "
        f"trained in {results['train_seconds']:.0f} s; results in {output}"
    )
    if config.baseline:
        other = json.loads((Path(config.baseline) / "results.json").read_text())
        print(f"test accuracy {other['test_accuracy']:.4f} of {config.baseline}, for comparison")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    config, debug = parse_arguments(arguments)
    return common.run("classify", lambda: _report(config), debug)


if __name__ == "__main__":
    sys.exit(main())
