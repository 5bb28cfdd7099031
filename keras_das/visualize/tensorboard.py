"""Callbacks that measure and draw the gates during training, and write them to TensorBoard."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_das._requirements import import_extra
from keras_das.layers import DASLayer
from keras_das.ops.arguments import standardize_count
from keras_das.visualize.drawing import to_pixels
from keras_das.visualize.gates import GateStatistics, gate_statistics
from keras_das.visualize.lookup import image_format, image_size, layers_of_kind, unique_names
from keras_das.visualize.plots import plot_gates, plot_sampling_points
from keras_das.visualize.samples import sample_of

_IDLE = 0.02  # deviation from 1 below which a gate counts as idle


class TensorBoardFigures(keras.callbacks.Callback):
    """Callback that writes figures of a model's gates to TensorBoard during training.

    Every N epochs, it writes the gates with their sampling points for all images (`plot_gates`), and the
    sampling points of each gate for the first image (`plot_sampling_points`). Requires TensorFlow, matplotlib
    and the package tensorboard.

    Args:
        log_dir: String or path. TensorBoard's folder.
        images: Sequence or batch of images as in `plot_gates`.
        every: Integer. Number of epochs between figures. Defaults to `1`.
        point: `(y, x)` in pixels of the image. Defaults to `None`, which selects the center.
        labels: Sequence of strings. See `plot_gates`. Defaults to `None`.
        pictures: Sequence of arrays. See `plot_gates`. Defaults to `None`.

    Raises:
        ValueError: If `every` is not a positive integer, or, when training begins, if the model has no gates.
        ImportError: If matplotlib or tensorboard is not installed.

    Example:

    >>> figures = keras_das.visualize.TensorBoardFigures("logs", images[:4], every=5)
    >>> model.fit(images, targets, callbacks=[figures])
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        images: Any,
        every: int = 1,
        point: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        pictures: Sequence[np.ndarray] | None = None,
    ):
        """Validates and stores the arguments."""
        super().__init__()
        for package in ("matplotlib.figure", "tensorboard"):
            import_extra(package, "viz")  # fails now instead of after the first epochs
        self.log_dir, self.images = str(log_dir), images
        self.every = standardize_count(every, "every")
        self.point, self.labels, self.pictures = point, labels, pictures

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that the model has gates, if it is built; others are checked at the first figures."""
        if self.model.built:
            _gates_of(self.model)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the figures every N epochs."""
        if (epoch + 1) % self.every:
            return
        import tensorflow as tf

        writer = tf.summary.create_file_writer(self.log_dir)
        with writer.as_default():
            for name, figure in self._figures():
                tf.summary.image(name, to_pixels(figure)[None], step=epoch)
        writer.close()

    def _figures(self) -> Iterator[tuple[str, Any]]:
        gates = _gates_of(self.model)
        shape = sample_of(self.model, self.images[0], gates).pixels.shape
        rows, columns = image_size(shape, image_format(self.model))
        point = ((rows - 1) / 2, (columns - 1) / 2) if self.point is None else self.point
        yield "gates", plot_gates(self.model, self.images, None, point, self.labels, self.pictures)
        picture = None if self.pictures is None else self.pictures[0]
        for gate, name in zip(gates, unique_names(gates), strict=True):
            figure = plot_sampling_points(self.model, self.images[0], gate, point, picture)
            yield f"sampling_points/{name}", figure


class GateMonitor(keras.callbacks.Callback):
    """Callback that measures how selective a model's gates are, and reports gates that are not.

    The gates are measured after each epoch. When training ends, one line names the gates with `identity_init`
    whose values are still within 2 % of 1, and suggests changes.

    Args:
        images: Array, a batch of inputs on which the gates are measured. For a model with several inputs, a
            list or dict of batches.
        log_dir: String or path. TensorBoard's folder for the statistics. Requires TensorFlow and the package
            tensorboard. Defaults to `None`, which writes nothing.

    Attributes:
        history: A dict from the name of each gate to its `GateStatistics`, one per epoch.

    Raises:
        ValueError: If the model has no gates, or if a gate is called more than once, as in a shared backbone,
            or inside a `tf.function`. Raised when training begins, or after the first epoch if the model is
            not built before.
        ImportError: If `log_dir` is given and tensorboard is not installed.

    Example:

    >>> monitor = keras_das.visualize.GateMonitor(images[:32])
    >>> model.fit(images, targets, callbacks=[monitor])
    >>> monitor.history["das_p5"][-1].spatial_deviation
    0.154
    """

    def __init__(self, images: Any, log_dir: str | os.PathLike | None = None):
        """Stores the arguments."""
        super().__init__()
        if log_dir is not None:
            import_extra("tensorboard", "viz")
        self.images, self.log_dir = images, log_dir
        self.history: dict[str, list[GateStatistics]] = {}

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Measures the gates once, so that a model that cannot be measured fails before the first epoch."""
        if self.model.built:
            self._measure()

    def _measure(self) -> list[GateStatistics]:
        _gates_of(self.model)
        return gate_statistics(self.model, self.images)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Measures the gates."""
        measured = self._measure()
        for gate in measured:
            self.history.setdefault(gate.name, []).append(gate)
        if self.log_dir is not None:
            _write_scalars(str(self.log_dir), measured, epoch)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Reports the gates that stayed close to 1."""
        gates = _gates_of(self.model)
        names = zip(gates, unique_names(gates), strict=True)
        identities = {name for gate, name in names if gate.identity_init}
        latest = [measured[-1] for name, measured in self.history.items() if name in identities]
        idle = [gate.name for gate in latest if abs(gate.mean - 1) + gate.deviation < _IDLE]
        if idle:
            print(
                f"Gates within {_IDLE:.0%} of 1: {', '.join(idle)}. They hardly change the feature maps. "
                "Train longer, raise the gates' learning rate or `identity_gain`, or use "
                "`identity_init=False`."
            )


def _gates_of(model: keras.Model) -> list[DASLayer]:
    gates = layers_of_kind(model, (DASLayer,))
    if not gates:
        raise ValueError(f"`model` must have gates. Received: model={model!r}")
    return gates


def _write_scalars(log_dir: str, measured: Sequence[GateStatistics], epoch: int) -> None:
    import tensorflow as tf

    writer = tf.summary.create_file_writer(log_dir)
    with writer.as_default():
        for gate in measured:
            for field in gate._fields[1:]:
                tf.summary.scalar(f"{gate.name}/{field}", getattr(gate, field), step=epoch)
    writer.close()
