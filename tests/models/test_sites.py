"""Tests of the values of `at`, and of errors that suggest suitable layers or models."""

import keras
import numpy as np
import pytest

from keras_das.models import attach_das
from tests.models.backbones import SMALL_GATE, assert_same, gates, images, plain_cnn


def test_layers_instead_of_names(rng):
    base = plain_cnn()
    first, second = base.get_layer("conv_0"), base.get_layer("relu_1")
    assert gates(attach_das(base, at=first, **SMALL_GATE)) == ["das_conv_0"]
    assert sorted(gates(attach_das(base, at=[first, "P3"], **SMALL_GATE))) == ["das_conv_0", "das_p3"]
    gated = attach_das(base, at=(first, second), **SMALL_GATE)
    assert gates(gated) == ["das_conv_0", "das_relu_1"]
    x = images(rng, 32)
    assert_same(gated(x), base(x))


def test_a_plain_operation_instead_of_its_name():
    image = keras.Input((16, 16, 3))
    x = keras.ops.relu(keras.layers.Conv2D(4, 3, 4)(image))
    operation = x._keras_history.operation
    assert gates(attach_das(keras.Model(image, x), at=operation, **SMALL_GATE)) == [f"das_{operation.name}"]


def test_layers_that_are_not_of_the_model():
    base, other = plain_cnn(), plain_cnn()
    with pytest.raises(
        ValueError, match=r"`at` must contain layers of the model 'plain'\. Received: 'conv_0', a Conv2D"
    ):
        attach_das(base, at=other.get_layer("conv_0"))
    image = keras.Input((32, 32, 3))
    outer = keras.Model(image, keras.layers.ReLU()(base(image)))
    with pytest.raises(ValueError, match="'conv_0' is inside the nested model 'plain'"):
        attach_das(outer, at=base.get_layer("conv_0"))
    with pytest.raises(ValueError, match="names the layer 'conv_0' twice"):
        attach_das(base, at=[base.get_layer("conv_0"), "conv_0"])


def shared_network(inputs):
    """A single-image network that is called with several inputs, as in siamese and triplet networks."""
    image = keras.Input((16, 16, 3))
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, 4)(image))
    network = keras.Model(image, keras.layers.Dense(2)(x), name="Embedding")
    images = [keras.Input((16, 16, 3)) for _ in range(inputs)]
    return keras.Model(images, keras.layers.Concatenate()([network(image) for image in images]))


@pytest.mark.parametrize("inputs", [2, 3])
def test_networks_of_several_images_around_one(inputs, rng):
    base = shared_network(inputs)
    with pytest.raises(
        ValueError, match=r"'Embedding': attach_das\(model.get_layer\('Embedding'\)\), and build"
    ):
        attach_das(base)
    assert gates(attach_das(base.get_layer("Embedding"), **SMALL_GATE)) == ["das_p2"]


def examples_in(message):
    return message.partition("for example one of [")[2].partition("]")[0].replace("'", "").split(", ")


def bypassed():
    """Taps inside a residual block and at an earlier level, as in the DeepLabV3+ of Keras' examples."""
    image = keras.Input((64, 64, 3))
    x = low = keras.layers.Conv2D(4, 3, 4, padding="same", name="low")(image)
    for i, strides in enumerate((2, 1)):
        y = keras.layers.Conv2D(4, 3, strides, padding="same", name=f"inner_{i}")(x)
        x = keras.layers.Conv2D(4, 1, strides, name=f"shortcut_{i}")(x)
        x = keras.layers.Add(name=f"sum_{i}")([x, y])
    tap = keras.layers.Conv2D(4, 3, padding="same", name="tap")(x)
    up = keras.layers.UpSampling2D(2)(tap)
    return keras.Model(image, keras.layers.Concatenate()([up, keras.layers.Conv2D(4, 1)(low)]))


def isotropic():
    """A model with all layers at 1/2 of the image size, as in the ConvMixer of Keras' examples."""
    image = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 2, 2, name="patches")(keras.layers.Rescaling(1 / 255)(image))
    for i in range(2):
        y = keras.layers.DepthwiseConv2D(3, padding="same")(x)
        x = keras.layers.Conv2D(4, 1, name=f"mixed_{i}")(keras.layers.Add(name=f"sum_{i}")([x, y]))
    return keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize(
    ("make", "message", "expected"),
    [
        (bypassed, "No single layer .* ends its level P3", ["sum_1", "tap"]),
        (isotropic, "no feature map of 1/4 to 1/32", ["sum_1", "mixed_1"]),
    ],
)
def test_errors_name_layers_that_can_be_gated(make, message, expected, rng):
    base = make()
    with pytest.raises(ValueError, match=message) as caught:
        attach_das(base)
    assert examples_in(str(caught.value)) == expected
    x = images(rng, base.input.shape[1])
    gated = attach_das(base, at=expected, **SMALL_GATE)
    assert_same(gated(x), base(x))


def test_single_frozen_weights_stay_frozen():
    base = plain_cnn()
    base.get_layer("conv_0").kernel.trainable = False
    base.get_layer("conv_1").bias.trainable = False
    base.get_layer("stem").trainable = False
    gated = attach_das(base, **SMALL_GATE)
    frozen = {weight.path for weight in base.weights if not weight.trainable}
    assert {weight.path for weight in gated.weights if not weight.trainable} == frozen
    assert len(frozen) == 4
    assert gated.get_layer("conv_0").bias.trainable


def test_single_frozen_weights_of_inner_layers():
    inner = keras.Sequential(
        [keras.Input((16, 16, 3)), keras.layers.BatchNormalization(), keras.layers.Conv2D(4, 3, 4)]
    )
    image = keras.Input((16, 16, 3))
    base = keras.Model(image, keras.layers.Conv2D(4, 1, name="outer")(inner(image)))
    inner.layers[1].bias.trainable = inner.layers[0].gamma.trainable = False
    gated = attach_das(base, at="outer", **SMALL_GATE)
    copied = next(layer for layer in gated.layers if layer.name == inner.name)
    assert [weight.trainable for weight in copied.weights] == [weight.trainable for weight in inner.weights]
    assert np.sum([weight.trainable for weight in copied.weights]) == 2


def test_layers_that_do_not_serialize():
    class Incomplete(keras.layers.Layer):
        def __init__(self, units):
            super().__init__()

        def call(self, inputs):
            return inputs

        def get_config(self):
            return {}

    image = keras.Input((16, 16, 3))
    base = keras.Model(image, keras.layers.Conv2D(4, 3, 4)(Incomplete(2)(image)))
    with pytest.raises(ValueError, match=r"cannot be copied.*Let `get_config` return all arguments"):
        attach_das(base)


@pytest.mark.slow
def test_backbones_around_an_image_encoder():
    keras_hub = pytest.importorskip("keras_hub")
    from tests.models.backbones import hub_resnet

    encoder = hub_resnet(image_shape=(64, 64, 3))
    detector = keras_hub.models.RetinaNetBackbone(encoder, min_level=3, max_level=5, use_p5=False)
    with pytest.raises(
        ValueError, match=r"attach_das\(backbone.image_encoder\), and build the RetinaNetBackbone"
    ):
        attach_das(detector)
    assert len(gates(attach_das(detector.image_encoder, **SMALL_GATE))) == 4


@pytest.mark.slow
def test_a_backbone_whose_layers_do_not_serialize():
    keras_hub = pytest.importorskip("keras_hub")
    base = keras_hub.models.MiTBackbone(
        image_shape=(32, 32, 3),
        layerwise_depths=[1, 1],
        hidden_dims=[4, 8],
        num_layers=2,
        layerwise_num_heads=[1, 1],
        layerwise_sr_ratios=[1, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
    )
    with pytest.raises(ValueError, match="keras_hub cannot serialize this class") as caught:
        attach_das(base)
    assert len(str(caught.value)) < 400


def test_the_data_format_of_a_nested_model():
    inner_image = keras.Input((3, 16, 24))
    x = keras.layers.Conv2D(4, 3, padding="same", data_format="channels_first")(inner_image)
    inner = keras.Model(inner_image, x, name="inner")
    bare = keras.Sequential([keras.Input((4, 16, 24)), keras.layers.ReLU()], name="bare")  # has no format
    image = keras.Input((3, 16, 24))
    gated = attach_das(keras.Model(image, bare(inner(image))), at=["inner", "bare"], **SMALL_GATE)
    assert [gated.get_layer(name).data_format for name in gates(gated)] == ["channels_first"] * 2


def test_a_site_that_is_neither_layer_nor_name():
    with pytest.raises(ValueError, match=r"`at` must contain layers, or names .*Received: at=5"):
        attach_das(plain_cnn(), at=5)
