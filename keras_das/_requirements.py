"""Checks of the requirements of this package and of its optional features."""

import importlib
from typing import Any

_TENSORFLOW_MINIMUM = (2, 18)
_INSTALL = (
    "pip install 'keras-das[tf]' (NVIDIA GPUs: also 'tensorflow[and-cuda]') or 'keras-das[tf-cpu]'; "
    "to use another Keras backend, set the environment variable KERAS_BACKEND"
)


def check_backend() -> None:
    """Raises an ImportError if TensorFlow, as Keras' backend, is missing or too old."""
    try:
        import keras
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ImportError(f"keras_das requires TensorFlow, which is not installed: {_INSTALL}.") from None
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    found = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if found < _TENSORFLOW_MINIMUM:
        minimum = ".".join(map(str, _TENSORFLOW_MINIMUM))
        raise ImportError(
            f"keras_das requires TensorFlow {minimum} or newer, but {tf.__version__} is installed: "
            f"{_INSTALL}."
        )


def import_extra(name: str, extra: str) -> Any:
    """Imports a module of an optional dependency; the ImportError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this feature of keras_das requires {name.partition('.')[0]}: "
            f"pip install 'keras-das[{extra}]' ({error})"
        ) from error


def check_keras_3(name: str, value: Any) -> None:
    """Raises a ValueError if the argument `name` is a model, layer or symbolic tensor of Keras 2."""
    if any(base.__module__.partition(".")[0] == "tf_keras" for base in type(value).__mro__):
        raise ValueError(
            f"`{name}` must be a Keras 3 object. Received: {name} of the Keras 2 class "
            f"{type(value).__name__}. Build the model with Keras 3 (`import keras`; `tf.keras` without the "
            "environment variable TF_USE_LEGACY_KERAS) and copy the weights: "
            "`new.set_weights(old.get_weights())`."
        )
