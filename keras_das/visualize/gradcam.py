"""`grad_cam`: the pixels of a feature map that contribute to the score of a class."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_das.visualize.capture import only_call, replaced_call
from keras_das.visualize.lookup import find_layer, image_format, to_numpy
from keras_das.visualize.samples import sample_of

Tensor = Any


def grad_cam(
    model: keras.Model, image: Any, layer: str | keras.layers.Layer, class_index: int | None = None
) -> np.ndarray:
    """Computes a Grad-CAM: the pixels of a feature map that contribute to the score of a class.

    The channels of the layer's output are weighted by the mean gradient of the score and summed. Negative
    values are set to 0. Supports TensorFlow and JAX.

    Args:
        model: Keras model. A classifier with one output `(N, classes)`, which is the score. After a softmax,
            the map also reflects evidence against the other classes.
        image: Array, list or dict; see `sampling_points`.
        layer: Layer that outputs a feature map, of the model or of a nested model, or its name.
        class_index: Integer. Index of the class. Defaults to `None`, which selects the class with the highest
            score.

    Returns:
        float32 array `(h, w)` with the size of the feature map, scaled to a maximum of 1, or all zeros if no
        pixel contributes.

    Raises:
        ValueError: If an argument is invalid. The message names it.
        NotImplementedError: If Keras uses another backend.

    Example:

    >>> keras_das.visualize.grad_cam(model, image, "das_p5").shape
    (7, 7)

    Reference:
        - [Selvaraju et al., 2017](https://arxiv.org/abs/1610.02391), equations 1 and 2
    """
    found = find_layer(model, layer, (keras.layers.Layer,))
    sample = sample_of(model, image, [found])
    with replaced_call([found], lambda of, call, x: call(x)) as seen:
        outputs = sample.run()
    features = only_call(found, [output for _, output in seen[id(found)]])
    if not hasattr(outputs, "shape") or len(outputs.shape) != 2:
        raise ValueError(f"`model` must have one output of shape (N, classes). Received: model={model!r}")
    if not hasattr(features, "shape") or len(features.shape) != 4:
        raise ValueError(f"`layer` must return a feature map. Received: layer={found.name!r}")
    if class_index is None:
        class_index = int(np.argmax(to_numpy(outputs)[0]))
    if not isinstance(class_index, int | np.integer) or not 0 <= class_index < outputs.shape[1]:
        raise ValueError(
            f"`class_index` must be an integer from 0 to {outputs.shape[1] - 1}. "
            f"Received: class_index={class_index}"
        )

    def score(change: Tensor) -> Tensor:
        with replaced_call([found], lambda of, call, x: call(x) + change):
            return ops.cast(sample.run()[0, class_index], "float32")

    gradient = _scaled_gradient(score, ops.zeros_like(features))
    features = to_numpy(features)
    if (getattr(found, "data_format", None) or image_format(model)) == "channels_first":
        features, gradient = (np.moveaxis(x, 1, -1) for x in (features, gradient))
    cam = np.maximum(np.sum(features * gradient.mean(axis=(1, 2), keepdims=True), axis=-1), 0)[0]
    return cam / cam.max() if cam.max() > 0 else cam


def _scaled_gradient(score: Callable[[Tensor], Tensor], at: Tensor) -> np.ndarray:
    """Returns a positive multiple of the gradient of a scalar function, in float32.

    Gradients of confident predictions are smaller than the smallest float16. The largest power of two without
    an overflow scales them.
    """
    scale = 2.0**24 if keras.backend.standardize_dtype(at.dtype) == "float16" else 1.0
    while True:
        gradient = to_numpy(_gradient(functools.partial(_multiplied, score, scale), at))
        if scale == 1 or np.isfinite(gradient).all():
            return gradient
        scale /= 16


def _multiplied(score: Callable[[Tensor], Tensor], factor: float, x: Tensor) -> Tensor:
    return factor * score(x)


def _gradient(score: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Returns the gradient of a scalar function of a tensor."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        # Without variables, only the layers after `at` are recorded and differentiated.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            value = score(at)
        return tape.gradient(value, at, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    if backend == "jax":
        import jax

        return jax.grad(score)(at)
    raise NotImplementedError(f"Grad-CAM requires Keras on TensorFlow or JAX. Received: backend {backend!r}")
