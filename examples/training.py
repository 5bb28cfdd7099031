"""Training runs: records, backups, optimizers, strategies, and clear errors."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_das
from examples import common
from examples.common import RunError, UserError


class History(keras.callbacks.CSVLogger):
    """A CSVLogger for resumed runs: removes the rows of epochs that are repeated."""

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        super().__init__(str(path), append=True)
        self.trimmed = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Trims the file, as the first epoch of the run is known only here; the open file appends."""
        if not self.trimmed:
            _trim_history(Path(self.filename), epoch)
            self.trimmed = True


def make_records(output: Path, resume: bool) -> list[keras.callbacks.Callback]:
    """The callbacks that write `history.csv` and TensorBoard's `logs` to the run's folder."""
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        common.remove(output / "history.csv")
    return [
        History(output / "history.csv"),
        keras.callbacks.TensorBoard(str(output / "logs"), write_graph=False),
    ]


def _trim_history(path: Path, epoch: int) -> None:
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    path.write_text(header + "".join(row for row in rows if int(row.split(",")[0]) < epoch))


def read_history(path: Path) -> dict[str, list[float | None]]:
    """The columns of a `history.csv`, with `None` for missing numbers, as JSON has no NaN."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def _number(text: str) -> float | None:
    value = float("nan" if text == "NA" else text)  # Keras' logger writes both
    return None if math.isnan(value) else value


class StepTimer(keras.callbacks.Callback):
    """Measures training steps, except the first two, which trace and compile."""

    def __init__(self) -> None:
        """Start with no steps."""
        super().__init__()
        self.seconds: list[float] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Store the start of the training."""
        self.began = time.perf_counter()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Store the duration of the training, including validation and saving."""
        self.total = time.perf_counter() - self.began

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Store the start of the step."""
        self.step_began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Store the duration of the step."""
        self.seconds.append(time.perf_counter() - self.step_began)

    def figures(self) -> dict[str, float | int | None]:
        """The measured times; the time per step is a median."""
        counted = self.seconds[2:]
        return {
            "train_seconds": self.total,
            "steps_run": len(self.seconds),
            "seconds_per_step": float(np.median(counted)) if counted else None,
        }


def prepare_backup(folder: Path, resume: bool, identity: Mapping[str, Any]) -> None:
    """Empty the folder of the training state or, to `resume`, check that its run has the same `identity`.

    `identity` contains the arguments that must not change when a run is resumed, as JSON values.
    """
    note = folder / "run.json"
    if resume and note.exists():
        _check_same_run(folder, json.loads(note.read_text()), identity)
        if not (folder / "training_metadata.json").exists():
            # Interrupted while writing the first state: an incomplete state would be read as complete.
            common.remove(folder / "latest.weights.h5")
        return
    if resume and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--resume: {folder} is not a folder of training state")
    common.remove(folder)
    folder.mkdir(parents=True)
    with common.replacing(note) as temporary:
        temporary.write_text(json.dumps(identity))


def _check_same_run(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            there = f"contains a run with {name} = {theirs.get(name)}"
            raise UserError(f"--resume: {folder} {there}, this one has {value}")


class Backup(keras.callbacks.BackupAndRestore):
    """Saves the training state after each epoch and restores it when training begins.

    Two generations are kept, so that one is complete if writing the other is interrupted. The caller deletes
    the folder after saving the results.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        """Keep the state in `folder`; without `writes`, only restore it from there."""
        super().__init__(str(folder), double_checkpoint=True, delete_checkpoint=False)
        self.writes = writes

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Check that the disk has space for the state and a copy of the previous one, and save it."""
        if not self.writes:
            return
        variables = self.model.variables + self.model.optimizer.variables
        size = sum(math.prod(variable.shape) * 8 for variable in variables)
        common.reserve(Path(self.backup_dir), 2 * size)
        super().on_epoch_end(epoch, logs)


def verbosity(progress: str) -> int:
    """Keras' `verbose` for `--progress auto|bar|lines|none`."""
    if progress == "auto":
        progress = "bar" if sys.stdout.isatty() else "lines"
    return {"none": 0, "bar": 1, "lines": 2}[progress]


@contextlib.contextmanager
def explaining(dataset: Any, backup: Path) -> Iterator[None]:
    """Turn errors during training into a line that says what to do."""
    resume = f"continue from the last complete epoch with --resume {backup}"
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{resume}", file=sys.stderr)
        raise
    except tf.errors.OpError as error:
        if not common.is_disk_full(error):
            # Decoding errors do not name the file.
            for split in dataset.splits.values():
                if hasattr(split, "check"):
                    split.check()
            raise
        raise RunError(f"disk full while training; free disk space and {resume}") from error
    except OSError as error:
        if common.is_disk_full(error):
            raise RunError(f"disk full while training; free disk space and {resume}") from error
        raise


STEP_EPOCHS, STEP_FACTOR = (0.3, 0.6, 0.9), 0.1
"""Schedule `steps`: the shares of all epochs after which the rate is multiplied by `STEP_FACTOR`."""


def learning_rate(
    config: Any, rate: float, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule | float:
    """The learning rate by step, for epochs of `steps` steps and the `config` of an example."""
    if config.schedule == "constant":
        return rate
    if config.schedule == "steps":
        boundaries = [round(share * config.epochs * steps) for share in STEP_EPOCHS]
        values = [rate * STEP_FACTOR**i for i in range(len(boundaries) + 1)]
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)
    warmup = min(round(config.warmup_epochs * steps), config.epochs * steps - 1)
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(rate, config.epochs * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, config.epochs * steps - warmup, warmup_target=rate, warmup_steps=warmup
    )


def make_optimizer(
    config: Any, steps: int, variables: Sequence[keras.Variable], gates: Sequence[keras.Layer] = ()
) -> keras.optimizers.Optimizer:
    """Returns the optimizer of `variables` for the `config` of an example and epochs of `steps` steps.

    Biases and norms do not decay. The optimizer is built here because TensorFlow traces a step twice if it
    creates variables, which is slow for large models.
    """
    optimizer = _one_optimizer(config, config.learning_rate, steps)
    if config.gate_rate != 1 and gates:
        if not hasattr(keras.optimizers, "MultiOptimizer"):
            raise UserError(f"--gate-rate requires Keras 3.15; this is {keras.__version__}")
        of_gates = _one_optimizer(config, config.gate_rate * config.learning_rate, steps)
        paths = {variable.path for gate in gates for variable in gate.trainable_variables}
        optimizers = keras.optimizers.OptimizerMap(optimizer, dict.fromkeys(paths, of_gates))
        optimizer = keras.optimizers.MultiOptimizer(optimizers)
    optimizer.build(variables)
    return optimizer


def _one_optimizer(config: Any, rate: float, steps: int) -> keras.optimizers.Optimizer:
    schedule, clip = learning_rate(config, rate, steps), getattr(config, "clip_norm", None) or None
    if config.optimizer == "sgd":
        decay = config.weight_decay or None
        optimizer = keras.optimizers.SGD(schedule, momentum=0.9, weight_decay=decay, global_clipnorm=clip)
    else:
        decay = config.weight_decay
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=decay, global_clipnorm=clip)
    if config.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The batch normalizations of a model, including those inside other layers."""
    # Private, because Keras' public `layers` leaves out those inside a layer that is not a model.
    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def make_loss_variables(model: keras.Model, batches: tf.data.Dataset) -> None:
    """Creates the variables of the metrics of several losses in advance, like `make_optimizer`.

    With `tf.distribute`, Keras creates them itself.
    """
    model.test_step(next(iter(batches)))
    model.reset_metrics()


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """A context in which models are created with this policy; `none` keeps the current one."""
    previous = keras.config.dtype_policy()
    if name != "none":
        keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, TensorFlow, Keras, this package and `packages`."""
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "keras_das": keras_das.__version__,
        **{name: importlib.metadata.version(name.replace("_", "-")) for name in packages},
    }


STRATEGIES = ("none", "mirrored", "multiworker")
STRATEGY_HELP = (
    "mirrored: divide each batch among all GPUs of the machine (or its CPU devices if it has none); "
    "multiworker: among the GPUs of all machines in TF_CONFIG; run the same command on each, with an output "
    "folder that all machines share"
)


def make_strategy(name: str, batch_size: int) -> tf.distribute.Strategy:
    """Returns the strategy that `--strategy` names; build and compile models in its scope.

    Call it before any other TensorFlow operation, because several machines must connect first. `batch_size`
    must be a multiple of the number of devices, or the mean over replicas is not the mean over the batch.
    """
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise UserError("--strategy multiworker needs the machines' addresses in TF_CONFIG")
        strategy = _Machines()
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    count = strategy.num_replicas_in_sync
    if batch_size % count:
        raise UserError(
            f"--batch-size must be a multiple of {count}, the number of devices, not {batch_size}"
        )
    return strategy


class _Machines(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy for Keras 3.15, which reduces structures and scalars; TensorFlow reduces single tensors."""

    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """Reduce every tensor of the structure `value`, scalars only over the replicas."""

        def reduce_one(each: Any) -> Any:
            rank = self.experimental_local_results(each)[0].shape.rank
            return reduce_tensor(reduce_op, each, axis if rank else None)

        reduce_tensor = super().reduce
        return tf.nest.map_structure(reduce_one, value)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes files: the first of several machines does."""
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_id


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Wait until every machine has reached this point."""

    @tf.function
    def meet() -> tf.Tensor:
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(1.0)))

    meet()
