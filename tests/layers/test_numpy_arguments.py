"""Tests of NumPy numbers as constructor arguments, which `keras.layers.Conv2D` also accepts."""

import json

import keras
import numpy as np
import pytest

import keras_das
from keras_das.ops.arguments import standardize_padding

COUNT = np.int64(2)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({"filters": np.int64(4)}, {"filters": 4}),
        ({"kernel_size": np.int32(3)}, {"kernel_size": (3, 3)}),
        ({"kernel_size": (np.int64(3), np.int8(1))}, {"kernel_size": (3, 1)}),
        ({"kernel_size": np.array([3, 1])}, {"kernel_size": (3, 1)}),
        ({"strides": np.uint8(2)}, {"strides": (2, 2)}),
        ({"dilation_rate": [COUNT, 1]}, {"dilation_rate": (2, 1)}),
        ({"groups": COUNT}, {"groups": 2}),
        ({"offset_groups": COUNT}, {"offset_groups": 2}),
        ({"padding": np.array([[1, 0], [2, 3]])}, {"padding": ((1, 0), (2, 3))}),
        ({"modulated": np.False_, "use_bias": np.True_}, {"modulated": False, "use_bias": True}),
    ],
)
def test_deformable_conv2d(arguments, plain):
    layer, expected = (
        keras_das.DeformableConv2D(**{"filters": 4, "kernel_size": 3, "name": "layer", **given})
        for given in (arguments, plain)
    )
    assert json.dumps(layer.get_config()["padding"]) == json.dumps(expected.get_config()["padding"])
    found, wanted = (keras.saving.serialize_keras_object(of) for of in (layer, expected))
    assert json.dumps(found) == json.dumps(wanted)
    images = np.ones((1, 9, 9, 4), "float32")
    assert layer(images).shape == expected(images).shape


@pytest.mark.parametrize(
    "arguments",
    [
        {"reduction": np.float32(0.5)},
        {"reduction": np.float64(0.5)},
        {"reduction": np.int64(1)},
        {"kernel_size": np.int64(3), "dilation_rate": (np.int16(2), 1), "offset_groups": COUNT},
    ],
)
def test_das_layer(arguments):
    layer = keras_das.DASLayer(**{"reduction": 0.5, **arguments})
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    loaded = keras.saving.deserialize_keras_object(config)
    assert loaded.get_config() == layer.get_config()
    assert {type(value) for value in (layer.reduction, loaded.reduction)} == {float}


def test_operation():
    images, kernel = np.ones((1, 5, 5, 2), "float32"), np.ones((3, 3, 2, 4), "float32")
    offsets = np.zeros((1, 3, 3, 18), "float32")
    ones = {"strides": np.int64(1), "dilation_rate": (np.int64(1),) * 2, "offset_groups": np.int64(1)}
    padding = ((np.int64(0), 0), (0, np.int8(0)))
    result = keras_das.ops.deformable_conv2d(images, kernel, offsets, padding=padding, **ones)
    np.testing.assert_array_equal(result, keras_das.ops.deformable_conv2d(images, kernel, offsets))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"filters": np.float32(4)}, "filters"),
        ({"filters": np.int64(0)}, "filters"),
        ({"groups": np.True_}, "groups"),
        ({"kernel_size": np.array([3, 3, 3])}, "kernel_size"),
        ({"kernel_size": np.array([3.0, 3.0])}, "kernel_size"),
        ({"strides": (np.int64(-1), 1)}, "strides"),
        ({"kernel_size": "33"}, "kernel_size"),
    ],
)
def test_what_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        keras_das.DeformableConv2D(**{"filters": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("reduction", [np.float32(0), np.float32("nan"), np.float64("inf"), np.True_, True])
def test_reductions_that_are_refused(reduction):
    with pytest.raises(ValueError, match="`reduction` must be a positive number"):
        keras_das.DASLayer(reduction=reduction)


def test_padding_of_numpy_numbers_is_of_pythons():
    padding = standardize_padding(((np.int64(1), np.int64(2)), np.array([3, 4])))
    assert padding == ((1, 2), (3, 4))
    assert {type(pixels) for pair in padding for pixels in pair} == {int}
