"""Tests of DASLayer: the layer suite, agreement with the paper's equations, and identity initialization."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from tests import oracle
from tests.layers import layer_suite as suite

CONFIGURATIONS = {
    "default": {},
    "identity": {"identity_init": True},
    "dense": {"deformable": "dense", "reduction": 0.5},
    "grouped": {"reduction": 0.4, "offset_groups": 2, "dilation_rate": 2},
    "wide": {"reduction": 0.8},
    "plain": {"modulated": False, "kernel_size": (1, 3)},
    "channels": {"norm": "channels"},
    "channels wide": {"norm": "channels", "reduction": 0.8, "identity_init": True, "identity_gain": 1.5},
    "channels dense": {"norm": "channels", "deformable": "dense", "offset_scale": 0.5},
    "regularized": {
        "kernel_initializer": keras.initializers.HeNormal(seed=1),
        "offset_initializer": "random_normal",
        "kernel_regularizer": "l2",
        "offset_regularizer": "l1",
        "activity_regularizer": "l2",
        "kernel_constraint": "max_norm",
        "offset_constraint": "unit_norm",
    },
}
DATA = pathlib.Path(__file__).parents[1] / "data"
IMAGES = suite.random_images((2, 7, 6, 10))


@pytest.fixture(params=CONFIGURATIONS)
def make_layer(request):
    return lambda **more: keras_das.DASLayer(**{**CONFIGURATIONS[request.param], **more})


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


@pytest.mark.parametrize("make_layer", ["grouped", "dense", "channels wide"], indirect=True)
def test_modes(layer):
    suite.check_modes_agree(layer, IMAGES, 1e-5)


@pytest.mark.parametrize("make_layer", ["default", "dense", "plain"], indirect=True)
def test_save(layer, tmp_path):
    suite.check_saves_and_loads(layer, IMAGES, tmp_path)


def test_every_weight_learns(layer):
    suite.check_every_weight_learns(layer, IMAGES)


@pytest.mark.parametrize("make_layer", ["default", "dense"], indirect=True)
def test_empty_batch(layer):
    suite.check_empty_batch(layer, IMAGES)


@pytest.mark.parametrize(
    ("make_layer", "policy"),
    [("default", "mixed_float16"), ("dense", "mixed_bfloat16"), ("wide", "mixed_bfloat16")],
    indirect=["make_layer"],
)
def test_mixed_precision(make_layer, policy):
    suite.check_mixed_precision(make_layer, IMAGES, policy)


@pytest.mark.parametrize("make_layer", ["grouped", "dense", "plain"], indirect=True)
def test_channels_first(make_layer):
    suite.check_channels_first(make_layer, IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_fit(jit_compile):
    suite.check_fits(keras_das.DASLayer(), suite.random_images((4, 6, 6, 5)), jit_compile)


def _oracle_weights(layer):
    """Returns the layer's weights under the names that the oracle uses."""
    deform = layer.deform
    count = deform.offset_groups * deform.taps * 2
    kernel, bias = deform.offset_kernel.numpy(), deform.offset_bias.numpy()
    (depthwise,), (pointwise,) = layer.depthwise.get_weights(), layer.reduce.get_weights()
    depthwise = np.swapaxes(depthwise, 2, 3)
    instance_scale, instance_center = layer.instance_norm.get_weights()
    layer_scale, layer_center = layer.layer_norm.get_weights()
    weights = {
        "reduce_depthwise": depthwise,
        "reduce_pointwise": pointwise[None, None],
        "instance_scale": instance_scale,
        "instance_center": instance_center,
        "offsets_kernel": kernel[..., :count],
        "offsets_bias": bias[:count],
        "deform_kernel": deform.kernel.numpy(),
        "layer_scale": layer_scale,
        "layer_center": layer_center,
    }
    if deform.modulated:
        weights |= {"mask_kernel": kernel[..., count:], "mask_bias": bias[count:]}
    if deform.bias is not None:
        weights["deform_bias"] = deform.bias.numpy()
    if layer.expand is not None:
        weights["pointwise"] = layer.expand.get_weights()[0][None, None]
    return weights


# Layer norm divides rounding errors by a possibly small deviation. In float64, the largest error is due to
# `tf.nn.gelu`, whose constant for the square root of 2 has float32 precision.
@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [*((name, "float64", 1e-6) for name in CONFIGURATIONS), ("default", "float32", 1e-4)],
)
def test_equations_by_the_oracle(name, dtype, bound, rng):
    layer = keras_das.DASLayer(**CONFIGURATIONS[name], dtype=dtype)
    images = rng.normal(size=(2, 9, 8, 10)).astype(dtype)
    layer.build(images.shape)
    suite.randomize_weights(layer)
    expected, gate = oracle.das_gate(
        images,
        _oracle_weights(layer),
        dilation_rate=layer.dilation_rate,
        offset_groups=layer.offset_groups,
        offset_scale=layer.offset_scale,
        norm_axes={"image": (1, 2, 3), "channels": -1}[layer.norm],
        gain=layer.identity_gain if layer.identity_init else 1,
        gate_scale=2 if layer.identity_init else 1,
    )
    for found, wanted in ((layer(images), expected), (layer.gate(images), gate)):
        error = np.abs(np.asarray(found, "float64") - wanted).max() / np.abs(wanted).max()
        assert error <= bound, error


@pytest.mark.parametrize("norm", ["image", "channels"])
@pytest.mark.parametrize("form", [{}, {"reduction": 0.8}, {"deformable": "dense"}], ids=str)
def test_a_large_common_offset_loses_no_digits(norm, form, rng):
    """The norm subtracts the common part of its inputs before squaring them."""
    layer = keras_das.DASLayer(norm=norm, **form)
    images = rng.normal(size=(2, 9, 8, 10)).astype("float32")
    layer.build(images.shape)
    suite.randomize_weights(layer)
    # GELU is the identity for such values, so the inputs of the norm have deviations of about 0.3 around
    # 1000.
    layer.instance_norm.beta.assign(layer.instance_norm.beta + 1000)
    layer.deform.offset_kernel.assign(0 * layer.deform.offset_kernel)
    _, gate = oracle.das_gate(
        images, _oracle_weights(layer), norm_axes={"image": (1, 2, 3), "channels": -1}[norm]
    )
    assert np.abs(np.asarray(layer.gate(images), "float64") - gate).max() < 2e-3


def test_the_image_norm_weighs_places_against_each_other(rng):
    """With the image norm, a gate differs between positions as a whole. With the channel norm, it cannot."""
    images = rng.normal(size=(1, 9, 8, 10)) * np.linspace(0, 3, 8)[:, None]
    deviations = {}
    for norm in ("image", "channels"):
        layer = keras_das.DASLayer(norm=norm)
        layer.build(images.shape)
        suite.randomize_weights(layer, scale=0.1)
        before = np.log(layer.gate(images) / (1 - layer.gate(images)))  # the argument of the sigmoid
        deviations[norm] = before.mean(-1).std()
    assert deviations["image"] > 3 * deviations["channels"]


def test_offset_scale_zero_freezes_the_offsets(rng):
    layer = keras_das.DASLayer(offset_scale=0)
    layer.build(IMAGES.shape)
    suite.randomize_weights(layer)
    offsets, mask = layer.predict_offsets(IMAGES)
    assert not np.asarray(offsets).any()
    assert np.asarray(mask).std() > 0


def test_configurations_of_earlier_versions_keep_their_meaning():
    config = keras_das.DASLayer().get_config()
    for entry in ("norm", "identity_gain", "offset_scale"):
        del config[entry]
    layer = keras_das.DASLayer.from_config(config)
    assert (layer.norm, layer.identity_gain, layer.offset_scale) == ("channels", 1, 1)
    del (deform := keras_das.DeformableConv2D(4, 3).get_config())["offset_scale"]
    assert keras_das.DeformableConv2D.from_config(deform).offset_scale == 1


@pytest.mark.skipif(
    "input_axes" not in keras.initializers.GlorotUniform().get_config(),
    reason="the file was written by Keras 3.15, whose initializers older versions cannot read",
)
def test_files_of_earlier_versions():
    """A model saved by version 0.1.0 reproduces its original outputs, except for rounding."""
    expected = np.load(DATA / "expected_0_1.npz")
    model = keras.saving.load_model(DATA / "model_0_1.keras")
    np.testing.assert_allclose(model.predict(expected["images"], verbose=0), expected["outputs"], atol=1e-5)
    assert {layer.norm for layer in model.layers if isinstance(layer, keras_das.DASLayer)} == {"channels"}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_model(rng):
    images = rng.normal(size=(2, 9, 8, 10)).astype("float32")
    model = keras.Sequential([keras.Input(images.shape[1:]), keras_das.DASLayer()])
    expected = model.predict(images, verbose=0)
    model.quantize("int8")
    assert model.layers[0].expand.quantization_mode == "int8"
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "jit_compile"),
    [("float32", True), ("float64", False), ("mixed_float16", False), ("mixed_bfloat16", True)],
)
def test_identity_start_changes_no_bit(dtype, jit_compile, rng):
    layer = keras_das.DASLayer(identity_init=True, dtype=dtype)
    images = tf.cast(rng.normal(0, 100, size=(2, 9, 8, 10)), layer.compute_dtype)
    for function in (layer, tf.function(layer, jit_compile=jit_compile)):
        np.testing.assert_array_equal(np.asarray(function(images)), np.asarray(images))
    np.testing.assert_array_equal(np.asarray(layer.gate(images)), 1)


def test_identity_start_can_be_left(rng):
    """The gate starts at 1, but training updates all of its weights."""
    layer = keras_das.DASLayer(identity_init=True)
    images = rng.normal(size=(4, 6, 6, 10)).astype("float32")
    layer.build(images.shape)
    before = layer.get_weights()
    suite.check_fits(layer, images, jit_compile=False)
    for old, new, weight in zip(before, layer.get_weights(), layer.weights, strict=True):
        assert np.abs(new - old).max() > 0, weight.path


def test_the_papers_gate_attenuates(rng):
    images = rng.normal(size=(2, 9, 8, 10)).astype("float32")
    gate = np.asarray(keras_das.DASLayer()(images)) / images
    assert ((gate > 0) & (gate < 1)).all()


@pytest.mark.parametrize(
    ("channels", "reduction", "width"),
    [(256, 0.2, 51), (2048, 0.2, 410), (3, 0.1, 1), (8, 1, 8), (4, 1.5, 6)],
)
def test_reduction(channels, reduction, width):
    layer = keras_das.DASLayer(reduction=reduction)
    layer.build((None, 8, 8, channels))
    assert layer.reduce.units == layer.deform.filters == width


def test_offsets_start_at_zero():
    layer = keras_das.DASLayer()
    offsets, mask = layer.predict_offsets(IMAGES)
    assert tuple(offsets.shape) == (2, 7, 6, 18)
    assert not np.asarray(offsets).any()
    np.testing.assert_array_equal(np.asarray(mask), 0.5)


def test_one_initializer_gives_each_weight_its_own_numbers():
    layer = keras_das.DASLayer(reduction=1, kernel_size=1, kernel_initializer=keras.initializers.HeNormal())
    layer.build((None, 4, 4, 8))
    pointwise, expand = layer.reduce.get_weights()[0], layer.expand.get_weights()[0]
    assert np.abs(pointwise - expand).max() > 0


@pytest.mark.parametrize("make_layer", ["default"], indirect=True)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1), (3, 3), (64, 33)])
def test_image_sizes(size, layer):
    images = suite.random_images((1, *size, 10))
    outputs = np.asarray(layer(images))
    assert outputs.shape == images.shape
    assert np.isfinite(outputs).all()


def test_one_layer_takes_many_sizes():
    inputs = keras.Input((None, None, 10))
    model = keras.Model(inputs, keras_das.DASLayer()(inputs))
    for size in (4, 9):
        assert model.predict(suite.random_images((2, size, size + 1, 10)), verbose=0).shape[1] == size


def test_model_add():
    model = keras.Sequential([keras.Input((8, 8, 3))])
    model.add(keras.layers.Conv2D(10, 3))
    model.add(keras_das.DASLayer())
    assert model.output_shape == (None, 6, 6, 10)
    assert any("das_layer" in layer.name for layer in model.layers)


def test_mask_of_the_input_passes_through():
    masked, mask = tf.constant(IMAGES), tf.ones((2, 7, 6), "bool")
    masked._keras_mask = mask
    assert keras_das.DASLayer()(masked)._keras_mask is mask


def test_half_precision_survives_large_values():
    """The norms sum in float32, so values near float16's maximum do not overflow."""
    layer = keras_das.DASLayer(identity_init=True, dtype="mixed_float16")
    images = tf.cast(suite.random_images((2, 8, 8, 10)) * 1e4, "float16")
    assert np.isfinite(np.asarray(layer(images))).all()


@pytest.mark.parametrize("dtype", ["mixed_float16", "float16"])
@pytest.mark.parametrize("arguments", [{}, {"deformable": "dense"}, {"reduction": 1}, {"kernel_size": 5}])
def test_identity_start_at_the_limit_of_float16(arguments, dtype, rng):
    """Sums of features near float16's limits, with either sign, do not overflow before the norm."""
    layer = keras_das.DASLayer(identity_init=True, dtype=dtype, **arguments)
    shape, limit = (2, 6, 6, 4), 65504
    extremes = np.full(shape, limit), rng.choice([-limit, limit], shape), rng.uniform(3e4, 6e4, shape)
    for images in extremes:
        images = images.astype("float16")
        np.testing.assert_array_equal(np.asarray(layer(images)), images)
        assert np.isfinite(np.asarray(layer.gate(images))).all()


def test_without_autocast(rng):
    """The layer computes in half precision from inputs that Keras does not cast."""
    x = rng.normal(size=(2, 6, 5, 4)).astype("float32")
    keras.utils.set_random_seed(1)
    expected = keras_das.DASLayer(dtype="mixed_float16")(x)
    keras.utils.set_random_seed(1)
    found = keras_das.DASLayer(dtype="mixed_float16", autocast=False)(x)
    assert found.dtype == expected.dtype == tf.float16
    np.testing.assert_array_equal(found, expected)


def test_the_samples_follow_the_offsets():
    """Constant offsets shift the positions that the gate samples, in (row, column) order."""
    layer = keras_das.DASLayer(reduction=1, kernel_size=1, modulated=False, norm="channels")
    layer.build((None, 9, 9, 2))
    bias = layer.deform.offset_bias
    images = suite.random_images((1, 9, 9, 2))
    at_rest = np.asarray(layer.gate(images))
    bias.assign([2.0, -1.0])  # two rows down, one column left
    moved = np.asarray(layer.gate(images))
    np.testing.assert_allclose(moved[:, :7, 1:], at_rest[:, 2:, :8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reduction": 0}, ["`reduction`", "reduction=0"]),
        ({"reduction": "0.2"}, ["`reduction`", "'0.2'"]),
        ({"reduction": float("nan")}, ["`reduction`", "nan"]),
        ({"kernel_size": 0}, ["`kernel_size`", "kernel_size=0"]),
        ({"dilation_rate": (1, 2, 3)}, ["`dilation_rate`", "(1, 2, 3)"]),
        ({"offset_groups": -1}, ["`offset_groups`", "offset_groups=-1"]),
        ({"deformable": "depthwise"}, ["`deformable`", "'depthwise'"]),
        ({"norm": "layer"}, ["`norm`", "'layer'", '"image" or "channels"']),
        ({"identity_init": "False"}, ["`identity_init`", "'False'"]),
        ({"modulated": None}, ["`modulated`", "None"]),
        ({"identity_gain": 0}, ["`identity_gain`", "identity_gain=0"]),
        ({"identity_gain": float("inf")}, ["`identity_gain`", "inf"]),
        ({"offset_scale": -1}, ["`offset_scale`", "offset_scale=-1"]),
        ({"data_format": "first"}, ["`data_format`", "'first'"]),
        ({"implementation": "cuda"}, ["`implementation`", "'cuda'"]),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match="Received") as caught:
        keras_das.DASLayer(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_offset_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"`offset_groups` must divide .*= 2.*offset_groups=3"):
        keras_das.DASLayer(offset_groups=3).build((None, 8, 8, 10))


def test_one_channel_is_said():
    """With the channel norm, the gate of a single channel is constant."""
    layer = keras_das.DASLayer(name="gate", norm="channels")
    with pytest.warns(UserWarning, match="'gate' multiplies all pixels by the same number"):
        layer.build((None, 8, 8, 1))
    gate = np.asarray(layer.gate(suite.random_images((2, 8, 8, 1))))
    np.testing.assert_allclose(gate, gate[0, 0, 0, 0])


@pytest.mark.parametrize("method", ["gate", "predict_offsets"])
def test_methods_refuse_symbols(method):
    """A functional model would keep the weights of the time of the call."""
    with pytest.raises(ValueError, match=f"`inputs` of `{method}` must not be symbolic"):
        getattr(keras_das.DASLayer(), method)(keras.Input((8, 8, 6)))


def test_the_gate_as_an_output(rng):
    """In the `call` of a layer, `gate` uses the weights that the layer has at the time."""

    class Both(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.das = keras_das.DASLayer()

        def call(self, inputs):
            return self.das(inputs), self.das.gate(inputs)

    image = keras.Input((8, 8, 6))
    model = keras.Model(image, Both()(image))
    model.layers[1].das.layer_norm.beta.assign(np.full(6, 2.0))
    x = rng.normal(size=(2, 8, 8, 6)).astype("float32")
    output, gate = model(x)
    np.testing.assert_allclose(output, x * np.asarray(gate), rtol=1e-6)
    assert np.median(gate) > 0.8


def test_unknown_channels():
    with pytest.raises(ValueError, match="must have a known number of channels"):
        keras_das.DASLayer().build((None, 8, 8, None))
