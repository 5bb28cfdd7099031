"""What `classify.py` and `detect.py` share: arguments, and a run from its seeds to its results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_das
from examples import common, training
from examples.common import RunError


@dataclasses.dataclass(kw_only=True)
class Config:
    """The arguments of both scripts. Each script adds its own, and defaults where there are none here."""

    data: str = "trees"
    data_dir: str | None = None
    image_size: int
    augment: str
    backbone: str
    weights: str = "none"
    attention: str = "das"
    identity_init: str = "auto"
    das: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Keras' 0.99 suits long runs: a few hundred steps are too few to forget the initial averages.
    norm_momentum: float = 0.9
    epochs: int
    batch_size: int
    optimizer: str = "adamw"
    learning_rate: float
    gate_rate: float = 1.0
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    weight_decay: float
    mixed_precision: str = "none"
    strategy: str = "none"
    seed: int = 0
    deterministic: bool = False
    output: str | None = None
    resume: str | None = None
    export: str | None = None
    progress: str = "auto"


PAPER_OFFSETS = {"dilation_rate": 1, "offset_scale": 1.0}
"""The paper's gates. SGD hardly moves the slow offsets that `attach_das` uses by default."""

CHOICES: dict[str, Collection[str]] = {
    "attention": ("none", "das"),
    "identity_init": ("auto", "on", "off"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "steps", "constant"),
    "mixed_precision": ("none", "mixed_float16", "mixed_bfloat16"),
    "strategy": training.STRATEGIES,
    "progress": ("auto", "bar", "lines", "none"),
}
HELP = {
    "data_dir": "folder of TensorFlow Datasets' files",
    "attention": "DAS gates after each stage, or none",
    "identity_init": "start gates at exactly 1; auto: on with pretrained weights, or as in --weights",
    "norm_momentum": "momentum of the moving averages of batch normalization",
    "optimizer": "AdamW, or SGD with momentum 0.9",
    "gate_rate": "learning rate of the gates relative to that of the other weights",
    "schedule": "schedule of the learning rate; steps: multiply by 0.1 after 30, 60 and 90 %% of the epochs",
    "warmup_epochs": "epochs of linear warm-up of the cosine schedule",
    "mixed_precision": "Keras dtype policy",
    "strategy": training.STRATEGY_HELP,
    "deterministic": "use deterministic operations of TensorFlow, which are slower",
    "resume": "folder of the training state (OUTPUT/backup) of an interrupted run to resume",
    "progress": "progress bar, one line per epoch, or none; auto: a bar on a terminal",
}
_KEPT = ("backbone", "attention", "das", "data", "image_size", "batch_size", "optimizer", "seed")
"""Arguments that must not change when a run is resumed."""


def with_output(config: Any, *parts: str) -> Any:
    """Returns the configuration with an output folder, by default one that is named after `parts`."""
    name = "-".join(Path(part.replace(":", "-")).name for part in parts)
    return dataclasses.replace(config, output=config.output or str(Path("runs") / name))


def gates_of(model: keras.Model) -> list[keras_das.DASLayer]:
    """Returns the gates of a model and of its nested models."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += gates_of(layer)
        elif isinstance(layer, keras_das.DASLayer):
            found.append(layer)
    return found


Monitors = list[keras_das.visualize.GateMonitor]
"""The monitor of a model with gates, or none."""


def gate_figures(monitors: Monitors) -> dict[str, Any]:
    """Returns the entry of `results.json` about the gates: their statistics after each epoch."""
    history = {name: of for monitor in monitors for name, of in monitor.history.items()}
    return {"gate_statistics": {name: [gate._asdict() for gate in of] for name, of in history.items()}}


class Run:
    """One run: its devices, its folders, and its results."""

    def __init__(self, config: Any) -> None:
        """Connects the devices and sets the seeds, which must precede all other TensorFlow operations."""
        self.config = config
        self.strategy = training.make_strategy(config.strategy, config.batch_size)
        self.chief = training.is_chief(self.strategy)
        self.output = Path(config.output)
        self.backup = Path(config.resume or self.output / "backup")
        keras.utils.set_random_seed(config.seed)
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()

    def prepare_backup(self, class_names: Sequence[str], *names: str) -> None:
        """Empties or checks the folder of the training state.

        Args:
            class_names: The classes, which must not change when the run is resumed.
            *names: Further arguments that must not change.
        """
        if self.chief:
            identity = {name: getattr(self.config, name) for name in (*_KEPT, *names)}
            identity["class_names"] = list(class_names)
            training.prepare_backup(self.backup, bool(self.config.resume), identity)
        training.wait_for_all(self.strategy)

    def records(self) -> list[keras.callbacks.Callback]:
        """The callbacks that record the training."""
        return training.make_records(self.output, bool(self.config.resume)) if self.chief else []

    def monitors(self, model: keras.Model, images: Any) -> Monitors:
        """Returns the callback that measures the gates on a batch of inputs, if the model has gates."""
        if not gates_of(model):
            return []
        return [keras_das.visualize.GateMonitor(images, self.output / "logs" if self.chief else None)]

    def finish(self, results: dict[str, Any], save: Callable[[], None]) -> None:
        """Adds the history to the results, writes everything, and removes the training state.

        Args:
            results: The content of `results.json`.
            save: Function that writes all other files, also with `replacing` and `export`.
        """
        if not self.chief:
            return
        results["history"] = training.read_history(self.output / "history.csv")
        try:
            save()
            with self.replacing("results.json") as path:
                path.write_text(json.dumps(results, indent=2) + "\n")
        except RunError as error:
            raise RunError(
                f"{error}; training is not lost: free disk space and repeat with --resume {self.backup}"
            ) from error
        common.remove(self.backup)

    def replacing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Returns `common.replacing` for a file of the output folder."""
        return common.replacing(self.output / name)

    def export(self, model: keras.Model) -> None:
        """Writes the SavedModel that `--export` asks for."""
        if self.config.export:
            with common.naming_full_disk(Path(self.config.export)):
                keras_das.export(model, self.config.export)
