"""LiteRT, formerly TensorFlow Lite: TensorFlow's converter, restricted to built-in operations."""

import re
import tempfile
from pathlib import Path

import keras

from keras_das.exporters import litert_sampling, precision
from keras_das.ops.deformable import substituted
from keras_das.ops.pointwise import as_convolutions

_IN_FLOAT32 = ("float16", "bfloat16", "float64")  # LiteRT supports few operations for these
_LACKING = (*_IN_FLOAT32, "int8", "int4", "float8_e4m3fn", "float8_e5m2")


def write(model: keras.Model, path: Path, verbose: bool = False) -> None:
    """Writes a `.tflite` file; see `keras_das.export`."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as scratch:
        with (
            substituted(litert_sampling.deformable_conv2d),
            as_convolutions(),
            precision.in_float32(model, _IN_FLOAT32),
        ):
            model.export(scratch, format="tf_saved_model", verbose=verbose)
        converter = tf.lite.TFLiteConverter.from_saved_model(scratch, signature_keys=["serving_default"])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            content = converter.convert()
        except Exception as error:  # the classes are private
            raise ValueError(
                f"`model` cannot be written as LiteRT: {_reason(error)}."
                f"{precision.advice(Path(scratch), _LACKING)}"
            ) from error
    path.write_bytes(content)


def _reason(error: Exception) -> str:
    """Returns the converter's list of unsupported operations, or its errors, or its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lacking = [line for line in lines if line.startswith(("TF Select ops:", "Custom ops:"))]
    errors = [re.sub(r"^.*?error: (loc\(.*?\): )?", "", line) for line in lines if "error: " in line]
    return "; ".join(lacking or errors or lines[-1:]) or type(error).__name__
