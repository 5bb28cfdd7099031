"""DASLayer: the suite over its arguments, the paper's equations by the oracle, and the identity start."""

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


def test_symbolic_call(layer):
    suite.check_symbolic_call_agrees(layer, IMAGES)


def test_modes(layer):
    suite.check_modes_agree(layer, IMAGES, 1e-5)


def test_save(layer, tmp_path):
    suite.check_saves_and_loads(layer, IMAGES, tmp_path)


def test_every_weight_learns(layer):
    suite.check_every_weight_learns(layer, IMAGES)


def test_empty_batch(layer):
    suite.check_empty_batch(layer, IMAGES)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(make_layer, policy):
    suite.check_mixed_precision(make_layer, IMAGES, policy)


def test_channels_first(make_layer):
    suite.check_channels_first(make_layer, IMAGES)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("identity_init", [False, True])
def test_fit(mode, identity_init):
    layer = keras_das.DASLayer(identity_init=identity_init)
    images = suite.random_images((4, 6, 6, 5))
    suite.check_fits(layer, images, jit_compile=mode == "xla", run_eagerly=mode == "eager")


def _oracle_weights(layer):
    """The layer's weights under the oracle's names."""
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


@pytest.mark.parametrize("name", CONFIGURATIONS)
# Layer norm divides rounding errors by what may be a small deviation. In float64 the largest of them is
# that of `tf.nn.gelu`, whose square root of 2 has the digits of float32.
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float64", 1e-6)])
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
        gate_scale=2 if layer.identity_init else 1,
    )
    for found, wanted in ((layer(images), expected), (layer.gate(images), gate)):
        error = np.abs(np.asarray(found, "float64") - wanted).max() / np.abs(wanted).max()
        assert error <= bound, error


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_model(rng):
    images = rng.normal(size=(2, 9, 8, 10)).astype("float32")
    model = keras.Sequential([keras.Input(images.shape[1:]), keras_das.DASLayer()])
    expected = model.predict(images, verbose=0)
    model.quantize("int8")
    assert model.layers[0].expand.quantization_mode == "int8"
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16", "mixed_bfloat16"])
def test_identity_start_changes_no_bit(dtype, rng):
    layer = keras_das.DASLayer(identity_init=True, dtype=dtype)
    images = tf.cast(rng.normal(0, 100, size=(2, 9, 8, 10)), layer.compute_dtype)
    for function in (layer, tf.function(layer), tf.function(layer, jit_compile=True)):
        np.testing.assert_array_equal(np.asarray(function(images)), np.asarray(images))
    np.testing.assert_array_equal(np.asarray(layer.gate(images)), 1)


def test_identity_start_can_be_left(rng):
    """The gate starts at 1, and yet training moves every part of it."""
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
    """The sums of the norms are float32: values near float16's largest do not become infinite."""
    layer = keras_das.DASLayer(identity_init=True, dtype="mixed_float16")
    images = tf.cast(suite.random_images((2, 8, 8, 10)) * 1e4, "float16")
    assert np.isfinite(np.asarray(layer(images))).all()


@pytest.mark.parametrize("dtype", ["mixed_float16", "float16"])
@pytest.mark.parametrize("arguments", [{}, {"deformable": "dense"}, {"reduction": 1}, {"kernel_size": 5}])
def test_identity_start_at_the_limit_of_float16(arguments, dtype, rng):
    """Sums of the largest features, of either sign, are not infinite ahead of the norm."""
    layer = keras_das.DASLayer(identity_init=True, dtype=dtype, **arguments)
    shape, limit = (2, 6, 6, 4), 65504
    extremes = np.full(shape, limit), rng.choice([-limit, limit], shape), rng.uniform(3e4, 6e4, shape)
    for images in extremes:
        images = images.astype("float16")
        np.testing.assert_array_equal(np.asarray(layer(images)), images)
        assert np.isfinite(np.asarray(layer.gate(images))).all()


def test_the_samples_follow_the_offsets():
    """Moving a bright spot by what an offset says moves what the gate sees with it, rows before columns."""
    layer = keras_das.DASLayer(reduction=1, kernel_size=1, modulated=False)
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
    """The norm makes the gate of one channel the same number everywhere."""
    layer = keras_das.DASLayer(name="gate")
    with pytest.warns(UserWarning, match="'gate' is on a map of one channel"):
        layer.build((None, 8, 8, 1))
    gate = np.asarray(layer.gate(suite.random_images((2, 8, 8, 1))))
    np.testing.assert_allclose(gate, gate[0, 0, 0, 0])


def test_unknown_channels():
    with pytest.raises(ValueError, match="number of channels must be known"):
        keras_das.DASLayer().build((None, 8, 8, None))
