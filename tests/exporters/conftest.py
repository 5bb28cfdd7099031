"""Models to export, test images of several sizes, and comparison helpers."""

import keras
import numpy as np
import pytest

import keras_das

SHAPES = [(1, 64, 64, 3), (2, 96, 96, 3), (3, 64, 80, 3)]


@pytest.fixture(scope="session")
def residual_network():
    """A narrow ResNet with four gates that accepts any batch and image size."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(16, 7, 2, "same", use_bias=False)(inputs)
    x = keras.layers.MaxPooling2D(3, 2, "same")(keras.layers.ReLU()(keras.layers.BatchNormalization()(x)))
    for number, filters in enumerate((16, 32, 32, 64), 1):
        strides = 1 if number == 1 else 2
        shortcut = keras.layers.Conv2D(filters, 1, strides, use_bias=False)(x)
        x = keras.layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        x = keras.layers.Add()([keras.layers.BatchNormalization()(x), shortcut])
        x = keras.layers.ReLU(name=f"stage{number}")(x)
    base = keras.Model(inputs, x)
    offsets = keras.initializers.RandomNormal(stddev=0.1)  # several pixels; some samples are out of bounds
    stages = [f"stage{number}" for number in range(1, 5)]
    gated = keras_das.attach_das(base, stages, identity_init=False, offset_initializer=offsets)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, "softmax")]
    return keras.Sequential([keras.Input((None, None, 3), name="image"), gated, *head])


@pytest.fixture(scope="session")
def expected(residual_network):
    """Pairs of images and Keras' outputs for them."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=shape).astype("float32") for shape in SHAPES]
    return [(images, residual_network.predict(images, verbose=0)) for images in batches]


def many_convolutions():
    """Returns a model with a gate and various deformable convolutions, and their total number.

    The model accepts any image size.
    """
    uniform = keras.initializers.RandomUniform(-0.5, 0.5)
    kinds = [
        {"strides": 2, "padding": "same"},  # the padding depends on the size
        {"dilation_rate": (2, 1), "padding": ((2, 0), (1, 3)), "use_bias": False},
        {"dilation_rate": (2, 3), "padding": "same", "kernel_size": (3, 2)},
        {"groups": 2, "offset_groups": 4, "padding": "same", "kernel_size": (3, 2)},
        {"modulated": False, "strides": (1, 2), "bias_initializer": uniform},
        {"groups": 8, "offset_groups": 2, "padding": "same", "kernel_size": 1},
    ]
    layers = [keras.Input((None, None, 3), name="image"), keras.layers.Conv2D(8, 3)]
    for kind in kinds:
        arguments = {"filters": 8, "kernel_size": 3, "offset_initializer": uniform, **kind}
        layers.append(keras_das.DeformableConv2D(**arguments))
    layers.append(keras_das.DASLayer(kernel_size=1, offset_initializer=uniform))
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()]), len(kinds) + 1


def assert_close(found, wanted):
    """Checks that the error is at most 1e-4 of the largest value."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
