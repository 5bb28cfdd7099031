"""Tests of unsupported inputs: the layers raise an error that names the dtype before doing anything else."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das

LAYERS = [keras_das.DASLayer, lambda: keras_das.DeformableConv2D(4, 3)]


@pytest.mark.parametrize("make_layer", LAYERS)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_dtypes_that_are_not_floating(make_layer, dtype):
    images = np.ones((1, 8, 8, 3), dtype)
    for inputs in (images, tf.constant(images), keras.Input((8, 8, 3), dtype=dtype)):
        with pytest.raises(ValueError, match=rf"`inputs` must have a floating dtype.* inputs\.dtype={dtype}"):
            make_layer()(inputs)


@pytest.mark.parametrize("make_layer", LAYERS)
def test_uint8_images_behind_a_rescaling(make_layer):
    image = keras.Input((8, 8, 3), dtype="uint8")
    model = keras.Model(image, make_layer()(keras.layers.Rescaling(1 / 255)(image)))
    assert model(np.ones((1, 8, 8, 3), "uint8")).dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_floating_dtypes_are_cast(dtype):
    assert keras_das.DASLayer()(np.ones((1, 8, 8, 3), dtype)).dtype == "float32"
