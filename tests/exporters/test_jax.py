"""SavedModels that are written by Keras on JAX."""

import os
import pathlib
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from tests.models.backbones import randomize

SCRIPT = """
    import keras, keras_das
    assert keras.backend.backend() == "jax"
    keras_das.export(keras.models.load_model("model.keras"), "exported")
"""


@pytest.mark.slow
def test_saved_model_of_any_batch(tmp_path, rng):
    inputs = keras.Input((8, 7, 3))
    x = keras_das.DASLayer(dilation_rate=2)(keras.layers.Conv2D(6, 3)(inputs))
    model = keras.Model(inputs, keras_das.DeformableConv2D(4, (2, 3), 2, "same")(x))
    randomize(model, rng)
    model.save(tmp_path / "model.keras")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(pathlib.Path.cwd())}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, env=environment)
    loaded = tf.saved_model.load(tmp_path / "exported")
    for batch in (1, 3):
        images = rng.normal(size=(batch, 8, 7, 3)).astype("float32")
        np.testing.assert_allclose(loaded.serve(images), model(images), rtol=1e-4, atol=1e-5)
