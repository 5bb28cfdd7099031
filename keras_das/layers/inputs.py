"""Validation of the layers' inputs."""

from typing import Any

import keras

from keras_das._requirements import check_keras_3


def check_input(inputs: Any) -> None:
    """Raises a ValueError for inputs of Keras 2 and for inputs that are not floating point."""
    check_keras_3("inputs", inputs)
    dtype = getattr(inputs, "dtype", None)
    if dtype is None:  # not a tensor yet
        return
    name = keras.backend.standardize_dtype(dtype)
    if not keras.backend.is_float_dtype(name):
        raise ValueError(
            "`inputs` must have a floating dtype. Cast them, or add a `keras.layers.Rescaling` before the "
            f"layer. Received: inputs.dtype={name}"
        )
