"""LiteRT, once TensorFlow Lite: TensorFlow's converter, and operations that the runtime itself has."""

import tempfile
from pathlib import Path

import keras

from keras_das.ops import native


def write(model: keras.Model, path: Path, verbose: bool = False) -> None:
    """Writes a `.tflite` file; see `keras_das.export`."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as scratch:
        with native.reference_only():
            model.export(scratch, format="tf_saved_model", verbose=verbose)
        converter = tf.lite.TFLiteConverter.from_saved_model(scratch, signature_keys=["serving_default"])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            content = converter.convert()
        except Exception as error:  # of several private classes
            raise ValueError(f"`model` cannot be written as LiteRT: {_reason(error)}") from error
    path.write_bytes(content)


def _reason(error: Exception) -> str:
    """The converter's list of what LiteRT lacks, or its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lacking = [line for line in lines if line.startswith(("TF Select ops:", "Custom ops:"))]
    return "; ".join(lacking) or (lines[-1] if lines else type(error).__name__)
