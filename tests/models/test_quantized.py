"""Tests of gates with quantized layers and mixed dtypes: outputs, saving, and copying."""

import copy

import keras
import pytest
from keras.dtype_policies import DTypePolicyMap

import keras_das
from keras_das.models import attach_das
from tests.models.backbones import SMALL_GATE, assert_same, gates, images, randomize

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
MODES = ("int8", "int4", "float8")


def gated_backbone(dtype=None):
    """A small KerasHub backbone, and the same with a gate. Policy maps refer to its layers by path."""
    keras_hub = pytest.importorskip("keras_hub")
    arguments = {"stackwise_num_repeats": [1, 1], "stackwise_num_filters": [4, 4], "image_shape": (16, 16, 3)}
    base = keras_hub.models.VGGBackbone(**arguments, dtype=dtype, name="vgg")
    return base, attach_das(base, at="P2", **SMALL_GATE)


def quantized_gate(mode):
    """A model with a quantized gate and no other quantized layers."""
    model = keras.Sequential([keras.Input((8, 8, 6)), keras_das.DASLayer(reduction=0.5, name="gate")])
    model.quantize(mode)
    return model


def modes_inside(model):
    return {
        layer.name: layer.quantization_mode for layer in model._flatten_layers() if layer.quantization_mode
    }


def check_copy(copied, model, rng):
    assert modes_inside(copied) == modes_inside(model)
    assert modes_inside(model)
    x = rng.normal(size=(2, *model.input_shape[1:])).astype("float32")
    assert_same(copied(x), model(x))


@pytest.mark.parametrize("mode", MODES)
def test_gates_after_quantized_layers(mode, rng):
    layers = [keras.layers.Conv2D(4, 3, 4, padding="same"), keras.layers.Dense(6, name="dense")]
    base = keras.Sequential([keras.Input((16, 16, 3)), *layers])
    base.quantize(mode)
    gated = attach_das(base, at="dense", **SMALL_GATE)
    assert gated.get_layer("dense").quantization_mode == mode
    assert gated.get_layer("das_dense").dtype_policy.name == "float32"
    x = images(rng, 16)
    assert_same(gated(x), base(x))


def test_precision_behind_the_quantization():
    base = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Dense(6, name="dense", dtype="mixed_bfloat16")]
    )
    base.quantize("int8")
    assert attach_das(base, at="dense").get_layer("das_dense").dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize(
    "layer", [keras_das.DASLayer, lambda **kwargs: keras_das.DeformableConv2D(4, 3, **kwargs)]
)
def test_quantized_dtype_is_refused(layer):
    with pytest.raises(ValueError, match=r"`dtype` must not be quantized.*quantize\('int8'\)"):
        layer(dtype="int8_from_float32")


@pytest.mark.parametrize("mode", MODES)
def test_file(mode, tmp_path, rng):
    model = quantized_gate(mode)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    check_copy(loaded, model, rng)
    loaded.save(tmp_path / "again.keras")
    check_copy(keras.saving.load_model(tmp_path / "again.keras"), model, rng)


@pytest.mark.parametrize("mode", MODES)
def test_copies(mode, rng):
    model = quantized_gate(mode)
    check_copy(copy.deepcopy(model), model, rng)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    check_copy(clone, model, rng)


@pytest.mark.parametrize("mode", MODES)
def test_attach_to_a_quantized_gated_model(mode, rng):
    layers = [keras.layers.Conv2D(4, 3, 4, padding="same", name="first"), keras.layers.ReLU(name="second")]
    gated = attach_das(keras.Sequential([keras.Input((16, 16, 3)), *layers]), at="first", **SMALL_GATE)
    gated.quantize(mode)
    check_copy(attach_das(gated, at="second", **SMALL_GATE), gated, rng)


def test_configuration_of_a_layer_that_is_not_built():
    """The quantized dtype policy is kept until `build` needs it."""
    config = quantized_gate("int8").get_layer("gate").get_config()
    layer = keras_das.DASLayer.from_config(config)
    assert not layer.built
    assert layer.get_config() == config
    assert set(config["quantization"]) == {"reduce", "expand"}


def test_custom_quantizers_are_kept(tmp_path, rng):
    narrow = keras.quantizers.AbsMaxQuantizer(axis=0, value_range=(-63, 63))
    model = keras.Sequential([keras.Input((8, 8, 6)), keras_das.DASLayer(reduction=0.5, name="gate")])
    model.quantize(config=keras.quantizers.Int8QuantizationConfig(weight_quantizer=narrow))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    check_copy(loaded, model, rng)
    assert loaded.get_layer("gate").reduce.quantization_config.weight_quantizer.value_range[1] == 63


def some_in_bfloat16():
    return DTypePolicyMap("float32", {"vgg/block1_conv1": keras.DTypePolicy("bfloat16")})


@pytest.mark.slow
@pytest.mark.parametrize("policy", [lambda: DTypePolicyMap("float32"), some_in_bfloat16, DTypePolicyMap])
def test_backbone_with_a_map_of_policies(policy, tmp_path, rng):
    base, gated = gated_backbone(policy())
    x = images(rng, 16)
    assert_same(gated(x), base(x))
    for name in ("a.keras", "b.keras"):  # twice, because saving changes the policies in a map
        gated.save(tmp_path / name)
        loaded = keras.saving.load_model(tmp_path / name)
        assert gates(loaded) == gates(gated)
        assert [of.compute_dtype for of in loaded.layers] == [of.compute_dtype for of in gated.layers]
        assert_same(loaded(x), gated(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_quantized_backbone(mode, tmp_path, rng):
    keras_hub = pytest.importorskip("keras_hub")
    _, gated = gated_backbone()
    randomize(gated, rng)
    gated.quantize(mode)
    classifier = keras_hub.models.ImageClassifier(gated, num_classes=3)
    x = images(rng, 16)
    expected = classifier(x)
    gated.save(tmp_path / "gated.keras")
    assert_same(keras.saving.load_model(tmp_path / "gated.keras")(x), gated(x))
    classifier.save(tmp_path / "classifier.keras")
    assert_same(keras.saving.load_model(tmp_path / "classifier.keras")(x), expected)
    gated.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert modes_inside(loaded) == modes_inside(gated)
    assert_same(loaded(x), gated(x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, DTypePolicyMap("float32")])
def test_preset_in_another_precision(dtype, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    _, gated = gated_backbone(dtype)
    gated.quantize("int8")
    gated.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path), dtype="mixed_bfloat16")
    assert {layer.compute_dtype for layer in loaded.layers[1:]} == {"bfloat16"}
    assert loaded.get_layer("das_p2").reduce.dtype_policy.name == "int8_from_mixed_bfloat16"
