"""`gate_map` and `gate_statistics`: the values of gates, and how selective they are."""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_das.layers import DASLayer
from keras_das.visualize.capture import inputs_of, run_batch
from keras_das.visualize.lookup import find_layer, layers_of_kind, to_numpy, unique_names
from keras_das.visualize.samples import sample_of

Tensor = Any


def gate_map(
    model: keras.Model, image: Any, layer: str | keras.layers.Layer, reduce: str | None = "share"
) -> np.ndarray:
    """Computes the factors by which a gate multiplies its feature map.

    Args:
        model: Keras model.
        image: Array, list or dict; see `sampling_points`.
        layer: `DASLayer` of the model or of a nested model, or its name.
        reduce: String or `None`. How channels are reduced. `"share"` is the share of the feature map's
            magnitude that the gate keeps, `sum |x A| / sum |x|` (the mean where x is 0). `"mean"` is the mean
            of A, which a layer norm keeps near the middle of A's range for every image. `None` returns all
            channels. Defaults to `"share"`.

    Returns:
        float32 array `(h, w)` or `(h, w, channels)` with the size of the feature map, channels last. Values
        are in (0, 1), or in (0, 2) for a gate with `identity_init`.

    Raises:
        ValueError: If an argument is invalid. The message names it.

    Example:

    >>> keras_das.visualize.gate_map(model, image, "das_p4").shape
    (14, 14)

    Reference:
        - [Salajegheh et al., 2023](https://arxiv.org/abs/2311.12091), equation 3
    """
    if reduce not in ("share", "mean", None):
        raise ValueError(f'`reduce` must be "share", "mean" or None. Received: reduce={reduce!r}')
    gate = find_layer(model, layer, (DASLayer,))
    (inputs,) = inputs_of(sample_of(model, image, [gate]).run, [gate])
    return reduced_gate(gate, inputs, reduce)


def gate_inputs(model: keras.Model, images: Any) -> list[tuple[DASLayer, Tensor]]:
    """Runs the model and returns the input of each of its gates.

    Args:
        model: Keras model.
        images: Array, a batch of inputs. For a model with several inputs, a list or dict of batches.

    Returns:
        Pairs of a gate and its input tensor, in the order of execution, including the gates of nested models.
        Inputs have the batch axis and the data format of the model.

    Raises:
        ValueError: If a gate is called more than once or not at all.
    """
    gates = layers_of_kind(model, (DASLayer,))
    order: list[Any] = []
    inputs = inputs_of(lambda: run_batch(model, images), gates, order)
    by_gate = {id(gate): x for gate, x in zip(gates, inputs, strict=True)}
    return [(gate, by_gate[id(gate)]) for gate in order]


class GateStatistics(NamedTuple):
    """The distribution of a gate's values over a batch of images; see `gate_statistics`."""

    name: str
    mean: float
    deviation: float
    spatial_deviation: float


def gate_statistics(model: keras.Model, images: Any) -> list[GateStatistics]:
    """Measures how selective each gate of a model is.

    Args:
        model: Keras model.
        images: Array, a batch of inputs. For a model with several inputs, a list or dict of batches.

    Returns:
        One `GateStatistics` for each gate, in the order of execution: `name` (numbered if several nested
        models have a gate of this name), the `mean` and the standard `deviation` of all values of the gate,
        and `spatial_deviation`, the standard deviation over rows and columns of the gate's mean over
        channels, averaged over the images. If the last is near 0, the gate selects channels but not
        locations.

    Raises:
        ValueError: If a gate is called more than once or not at all.

    Example:

    >>> for gate in keras_das.visualize.gate_statistics(model, images):
    ...     print(gate.name, round(gate.spatial_deviation, 3))
    das_p4 0.118
    das_p5 0.154
    """
    gates = layers_of_kind(model, (DASLayer,))
    names = {id(gate): name for gate, name in zip(gates, unique_names(gates), strict=True)}
    return [
        _statistics(names[id(gate)], gate, to_numpy(gate.gate(x))) for gate, x in gate_inputs(model, images)
    ]


def _statistics(name: str, gate: DASLayer, values: np.ndarray) -> GateStatistics:
    channels = 3 if gate.data_format == "channels_last" else 1
    by_place = values.mean(axis=channels).reshape(len(values), -1)
    return GateStatistics(name, float(values.mean()), float(values.std()), float(by_place.std(axis=1).mean()))


def reduced_gate(gate: DASLayer, inputs: Tensor, reduce: str | None) -> np.ndarray:
    """Returns the gate for the first image of its input, reduced as in `gate_map`."""
    values, features = to_numpy(gate.gate(inputs))[0], to_numpy(inputs)[0]
    if gate.data_format == "channels_first":
        values, features = (np.moveaxis(x, 0, -1) for x in (values, features))
    return reduce_channels(values, features, reduce)


def reduce_channels(values: np.ndarray, features: np.ndarray, reduce: str | None) -> np.ndarray:
    """Reduces the channels of a gate `(h, w, channels)`, weighted by feature magnitudes for "share"."""
    if reduce is None:
        return values
    weights = np.abs(features) if reduce == "share" else np.ones_like(features)
    weights[weights.sum(axis=-1) == 0] = 1
    return np.average(values, axis=-1, weights=weights)
