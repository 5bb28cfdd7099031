"""What keeps a training run alive: its record, its backup, and plain words when it stops."""

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
    """A CSVLogger that a resumed run continues: rows of epochs that are about to be repeated go."""

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        super().__init__(str(path), append=True)
        self.trimmed = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Only here is it known where the run begins; the open file appends to what is left."""
        if not self.trimmed:
            _trim_history(Path(self.filename), epoch)
            self.trimmed = True


def make_records(output: Path, resume: bool) -> list[keras.callbacks.Callback]:
    """What writes a run's figures into its folder: `history.csv`, and TensorBoard's `logs`."""
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
    """The columns of a `history.csv`; None where there was no number, for JSON knows no NaN."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def _number(text: str) -> float | None:
    value = float("nan" if text == "NA" else text)  # Keras' logger writes either
    return None if math.isnan(value) else value


class StepTimer(keras.callbacks.Callback):
    """Measures training steps; the first two of a run, which trace and compile, do not count."""

    def __init__(self) -> None:
        """Start with no steps."""
        super().__init__()
        self.seconds: list[float] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Note when training began."""
        self.began = time.perf_counter()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Note how long training took, validation and saving included."""
        self.total = time.perf_counter() - self.began

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Note when the step began."""
        self.step_began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Note how long the step took."""
        self.seconds.append(time.perf_counter() - self.step_began)

    def figures(self) -> dict[str, float | int | None]:
        """What was measured; the step's time is a median."""
        counted = self.seconds[2:]
        return {
            "train_seconds": self.total,
            "steps_run": len(self.seconds),
            "seconds_per_step": float(np.median(counted)) if counted else None,
        }


def prepare_backup(folder: Path, resume: bool, identity: Mapping[str, Any]) -> None:
    """Empty the folder for the training state, or, to `resume`, check that it holds a run of this `identity`.

    `identity` is what must not change between a run and its continuation; JSON can hold it.
    """
    note = folder / "run.json"
    if resume and note.exists():
        _check_same_run(folder, json.loads(note.read_text()), identity)
        if not (folder / "training_metadata.json").exists():
            # Stopped while the first state was written: what there is of it would be taken for whole.
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
            there = f"holds a run with {name} = {theirs.get(name)}"
            raise UserError(f"--resume: {folder} {there}, this one has {value}")


class Backup(keras.callbacks.BackupAndRestore):
    """Saves the training state after each epoch and restores it when training begins.

    Two generations are kept: the older is whole if the newer is cut short. Whoever trains deletes the folder
    once the results are saved.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        """Keep the state in `folder`, or only restore it from there if something else `writes` it."""
        super().__init__(str(folder), double_checkpoint=True, delete_checkpoint=False)
        self.writes = writes

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Make sure of the room for the state, and for a copy of the one before, and save it."""
        if not self.writes:
            return
        variables = self.model.variables + self.model.optimizer.variables
        size = sum(math.prod(variable.shape) * 8 for variable in variables)
        common.reserve(Path(self.backup_dir), 2 * size)
        super().on_epoch_end(epoch, logs)


def verbosity(progress: str) -> int:
    """Keras's `verbose` for `--progress auto|bar|lines|none`."""
    if progress == "auto":
        progress = "bar" if sys.stdout.isatty() else "lines"
    return {"none": 0, "bar": 1, "lines": 2}[progress]


@contextlib.contextmanager
def explaining(dataset: Any, backup: Path) -> Iterator[None]:
    """Turn what can go wrong in the middle of training into a line that says what to do."""
    resume = f"continue from the last complete epoch with --resume {backup}"
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{resume}", file=sys.stderr)
        raise
    except tf.errors.OpError as error:
        if not common.is_disk_full(error):
            # A decoding error does not say which file it met.
            for split in dataset.splits.values():
                if hasattr(split, "check"):
                    split.check()
            raise
        raise RunError(f"disk full while training; make room and {resume}") from error
    except OSError as error:
        if common.is_disk_full(error):
            raise RunError(f"disk full while training; make room and {resume}") from error
        raise


STEP_EPOCHS, STEP_FACTOR = (0.3, 0.6, 0.9), 0.1
"""Schedule `steps`: at these shares of all epochs (30, 60 and 90 of 100) the rate is multiplied by this."""


def learning_rate(
    config: Any, rate: float, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule | float:
    """A rate by step, for epochs of `steps` steps; `config` is that of an example."""
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
    """The optimizer of `variables` by an example's `config`, for epochs of `steps` steps.

    Biases and norms do not decay. The optimizer's own variables are made here: TensorFlow traces a step that
    makes variables twice, which for a ResNet-50 is half a minute.
    """
    factor = getattr(config, "gate_rate", 1.0)
    optimizer = _one_optimizer(config, config.learning_rate, steps)
    if factor != 1 and gates:
        of_gates = _one_optimizer(config, factor * config.learning_rate, steps)
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


def make_loss_variables(model: keras.Model, batches: tf.data.Dataset) -> None:
    """What `make_optimizer` does for the optimizer's variables, for those of losses that are several.

    With `tf.distribute`, Keras does so itself.
    """
    model.test_step(next(iter(batches)))
    model.reset_metrics()


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Within it, models are made with this policy; `none` leaves Keras' own."""
    previous = keras.config.dtype_policy()
    if name != "none":
        keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def versions(*packages: str) -> dict[str, str]:
    """What ran: Python, TensorFlow, Keras, this package, and `packages` besides."""
    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "keras_das": keras_das.__version__,
        **{name: importlib.metadata.version(name.replace("_", "-")) for name in packages},
    }


STRATEGIES = ("none", "mirrored", "multiworker")
STRATEGY_HELP = (
    "mirrored: each batch is divided among all GPUs of the machine (without any, its CPU devices); "
    "multiworker: among those of all machines in TF_CONFIG, each of which runs this command, with an output "
    "folder that all of them see"
)


def make_strategy(name: str, batch_size: int) -> tf.distribute.Strategy:
    """What `--strategy` names; models are built and compiled in its scope.

    To be called before TensorFlow does anything else: several machines must meet first. Batches of
    `batch_size` must divide evenly, or the replicas' means would not be that of the batch.
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
    """Keras 3.15 reduces whole structures, and scalars along an axis; TensorFlow takes single tensors."""

    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """Reduce every tensor of the structure `value`, those without axes over the replicas alone."""

        def reduce_one(each: Any) -> Any:
            rank = self.experimental_local_results(each)[0].shape.rank
            return reduce_tensor(reduce_op, each, axis if rank else None)

        reduce_tensor = super().reduce
        return tf.nest.map_structure(reduce_one, value)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files: of several machines, the first."""
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_id


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Go on only when every machine has come to this place."""

    @tf.function
    def meet() -> tf.Tensor:
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(1.0)))

    meet()
