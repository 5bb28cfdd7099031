"""Tests of DeformableConv2D: the layer suite, agreement with the oracle, and the initial state."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das.kernels import library
from tests import oracle
from tests.layers import layer_suite as suite

CONFIGURATIONS = {
    "default": {"filters": 4, "kernel_size": 3},
    "strided": {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"},
    "dilated": {"filters": 4, "kernel_size": (2, 3), "dilation_rate": (1, 2), "padding": "same"},
    "depthwise": {"filters": 6, "kernel_size": 3, "groups": 6, "padding": "same", "use_bias": False},
    "grouped": {"filters": 4, "kernel_size": 3, "groups": 2, "offset_groups": 3, "activation": "tanh"},
    "plain": {"filters": 3, "kernel_size": 3, "modulated": False, "padding": ((1, 2), (0, 1))},
    "regularized": {
        "filters": 3,
        "kernel_size": 1,
        "kernel_initializer": "he_normal",
        "bias_initializer": "ones",
        "offset_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=3),
        "kernel_regularizer": "l2",
        "bias_regularizer": "l1",
        "offset_regularizer": "l2",
        "activity_regularizer": "l2",
        "kernel_constraint": "max_norm",
        "bias_constraint": "non_neg",
        "offset_constraint": "unit_norm",
    },
}
IMAGES = suite.random_images((2, 7, 6, 6))


@pytest.fixture(params=CONFIGURATIONS)
def make_layer(request):
    return lambda **more: keras_das.DeformableConv2D(**{**CONFIGURATIONS[request.param], **more})


@pytest.fixture
def layer(make_layer):
    layer = make_layer()
    layer.build(IMAGES.shape)
    suite.randomize_weights(layer)
    return layer


def test_config(layer):
    suite.check_config_round_trip(layer)


def test_regularizers_and_constraints(layer):
    suite.check_regularizers_and_constraints(layer)


def test_symbolic_call(layer):
    suite.check_symbolic_call_agrees(layer, IMAGES)


@pytest.mark.parametrize("make_layer", ["strided", "grouped"], indirect=True)
def test_modes(layer):
    suite.check_modes_agree(layer, IMAGES, 1e-5)


@pytest.mark.parametrize("make_layer", ["depthwise", "plain"], indirect=True)
def test_save(layer, tmp_path):
    suite.check_saves_and_loads(layer, IMAGES, tmp_path)


def test_every_weight_learns(layer):
    suite.check_every_weight_learns(layer, IMAGES)


@pytest.mark.parametrize("make_layer", ["default", "plain"], indirect=True)
def test_empty_batch(layer):
    suite.check_empty_batch(layer, IMAGES)


@pytest.mark.parametrize(
    ("make_layer", "policy"),
    [("strided", "mixed_float16"), ("grouped", "mixed_bfloat16")],
    indirect=["make_layer"],
)
def test_mixed_precision(make_layer, policy):
    suite.check_mixed_precision(make_layer, IMAGES, policy)


@pytest.mark.parametrize("make_layer", ["strided", "grouped", "plain"], indirect=True)
def test_channels_first(make_layer):
    padding = make_layer().padding
    if isinstance(padding, str):
        suite.check_channels_first(make_layer, IMAGES)
    else:  # the pads are (rows, columns) in both data formats
        suite.check_channels_first(lambda **more: make_layer(padding=padding, **more), IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_fit(jit_compile):
    layer = keras_das.DeformableConv2D(4, 3, padding="same", activation="relu")
    suite.check_fits(layer, suite.random_images((4, 6, 6, 3)), jit_compile)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_against_oracle(name, rng):
    """The op uses offsets and masks from an ordinary convolution of the inputs."""
    settings = CONFIGURATIONS[name]
    layer = keras_das.DeformableConv2D(**{**settings, "activation": None}, dtype="float64")
    images = rng.normal(size=(2, 8, 7, 6))
    layer.build(images.shape)
    suite.randomize_weights(layer)
    predictor = keras.layers.Conv2D(
        layer.offset_bias.shape[0],
        settings["kernel_size"],
        strides=settings.get("strides", 1),
        padding=layer.padding if isinstance(layer.padding, str) else "valid",
        dilation_rate=settings.get("dilation_rate", 1),
        dtype="float64",
    )
    padded = images
    if not isinstance(layer.padding, str):
        padded = np.pad(images, ((0, 0), *layer.padding, (0, 0)))
    predictor.build(padded.shape)
    predictor.set_weights([layer.offset_kernel.numpy(), layer.offset_bias.numpy()])
    predictions = predictor(padded).numpy()
    count = layer.offset_groups * layer.taps * 2
    expected = oracle.deformable_conv2d(
        images,
        layer.kernel.numpy(),
        predictions[..., :count],
        1 / (1 + np.exp(-predictions[..., count:])) if layer.modulated else None,
        None if layer.bias is None else layer.bias.numpy(),
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        offset_groups=layer.offset_groups,
    )
    np.testing.assert_allclose(
        layer(images).numpy(), expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max()
    )


def test_starts_as_half_a_convolution():
    """With zero offsets and masks of sigmoid(0), the outputs are half those of an equal Conv2D."""
    layer = keras_das.DeformableConv2D(5, 3, padding="same", use_bias=False)
    outputs = layer(IMAGES)
    offsets, mask = layer.predict_offsets(IMAGES)
    assert not np.asarray(offsets).any()
    np.testing.assert_array_equal(np.asarray(mask), 0.5)
    plain = keras.ops.conv(IMAGES, layer.kernel, padding="same")
    np.testing.assert_allclose(np.asarray(outputs), np.asarray(plain) / 2, rtol=1e-5, atol=1e-6)


def test_unmodulated_starts_as_a_convolution():
    layer = keras_das.DeformableConv2D(5, 3, strides=2, padding="same", modulated=False)
    plain = keras.layers.Conv2D(5, 3, strides=2, padding="same")
    outputs = layer(IMAGES)
    assert layer.predict_offsets(IMAGES)[1] is None
    plain.build(IMAGES.shape)
    plain.set_weights([layer.kernel.numpy(), layer.bias.numpy()])
    np.testing.assert_allclose(np.asarray(outputs), np.asarray(plain(IMAGES)), rtol=1e-5, atol=1e-6)


def test_mask_of_the_input_ends_here():
    masked = tf.constant(IMAGES)
    masked._keras_mask = tf.ones((2, 7, 6), "bool")
    outputs = keras_das.DeformableConv2D(4, 3)(masked)
    assert getattr(outputs, "_keras_mask", None) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"filters": 0}, ["`filters`", "filters=0"]),
        ({"filters": 2.5}, ["`filters`", "2.5"]),
        ({"kernel_size": (3, 3, 3)}, ["`kernel_size`", "(3, 3, 3)"]),
        ({"kernel_size": 0}, ["`kernel_size`", "kernel_size=0"]),
        ({"strides": -1}, ["`strides`", "strides=-1"]),
        ({"use_bias": 1}, ["`use_bias`", "use_bias=1"]),
        ({"modulated": "no"}, ["`modulated`", "'no'"]),
        ({"dilation_rate": "2"}, ["`dilation_rate`", "'2'"]),
        ({"strides": 2, "dilation_rate": 2}, ["`strides`", "`dilation_rate`", "(2, 2)"]),
        ({"padding": "full"}, ["`padding`", "'full'"]),
        ({"padding": ((1, -1), (0, 0))}, ["`padding`", "-1"]),
        ({"padding": 2}, ["`padding`", "padding=2"]),
        ({"groups": 3}, ["`groups`", "groups=3", "filters=4"]),
        ({"offset_groups": 0}, ["`offset_groups`", "offset_groups=0"]),
        ({"data_format": "NHWC"}, ["`data_format`", "'NHWC'"]),
        ({"implementation": "fast"}, ["`implementation`", "'fast'"]),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match="Received") as caught:
        keras_das.DeformableConv2D(**{"filters": 4, "kernel_size": 3, **arguments})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("arguments", "shape", "words"),
    [
        ({"groups": 2}, (2, 8, 8, 5), ["`groups`", "groups=2", "(2, 8, 8, 5)"]),
        ({"offset_groups": 4}, (2, 8, 8, 6), ["`offset_groups`", "offset_groups=4"]),
        ({"kernel_size": 5}, (2, 4, 8, 6), ["`kernel_size`", "(5, 5)", "(2, 4, 8, 6)"]),
        ({}, (None, 8, 8, None), ["`groups`", "None"]),
    ],
)
def test_inputs_that_do_not_fit(arguments, shape, words):
    with pytest.raises(ValueError, match="Received") as caught:
        keras_das.DeformableConv2D(**{"filters": 4, "kernel_size": 3, **arguments}).build(shape)
    assert all(word in str(caught.value) for word in words), caught.value


def test_native_is_refused_by_name(monkeypatch):
    """Without a kernel library, `implementation="native"` raises an error."""
    monkeypatch.setattr(library, "why_not", lambda framework: "there is no library")
    layer = keras_das.DeformableConv2D(4, 3, implementation="native")
    with pytest.raises(RuntimeError, match=r'implementation="native" cannot be used: .*library'):
        layer(IMAGES)


def test_wrong_rank_names_what_it_got():
    with pytest.raises(ValueError, match="ndim=4, found ndim=3"):
        keras_das.DeformableConv2D(4, 3)(IMAGES[0])
