"""Validation of the layers' inputs and of arguments that only they have."""

import math
import numbers
from collections.abc import Collection
from typing import Any

import keras
import numpy as np

from keras_das._requirements import check_keras_3


def standardize_flag(value: bool, name: str) -> bool:
    """Returns `value` as a bool if it is one, including NumPy's, or raises a ValueError."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return bool(value)


def standardize_factor(value: float, name: str) -> float:
    """Returns `value` as a float if it is a finite number of at least 0, or raises a ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number of at least 0. Received: {name}={value!r}")
    return float(value)


def standardize_choice(value: Any, name: str, choices: Collection[str]) -> str:
    """Returns `value` if it is one of the choices, or raises a ValueError."""
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be {listed}. Received: {name}={value!r}")
    return value


def check_not_symbolic(inputs: Any, method: str) -> None:
    """Raises a ValueError for a symbolic input of a method that is not recorded in the graph of layers."""
    if isinstance(inputs, keras.KerasTensor):
        raise ValueError(
            f"`inputs` of `{method}` must not be symbolic, because a functional model would contain the "
            f"weights of the layer as constants. Call `{method}` in the `call` of a layer instead. "
            f"Received: inputs={inputs}"
        )


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
