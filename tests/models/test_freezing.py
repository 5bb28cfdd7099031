"""Tests of `freeze_trunk`: only gates and head, not the layers that gates depend on, stay trainable."""

import keras
import numpy as np
import pytest

import keras_das
from tests.models.backbones import SMALL_GATE, hub_resnet, images, plain_cnn


def trainable(model):
    return {weight.path.split("/")[0] for weight in model.trainable_weights}


def test_a_flat_model():
    model = keras_das.attach_das(plain_cnn(), **SMALL_GATE)
    keras_das.freeze_trunk(model)
    assert trainable(model) == {"das_p2", "das_p3", "classes"}
    keras_das.freeze_trunk(model, False)
    assert all(weight.trainable for weight in model.weights)


def test_layers_after_the_last_gate_are_the_head():
    model = keras_das.attach_das(plain_cnn(), at="relu_0", **SMALL_GATE)
    keras_das.freeze_trunk(model)
    assert trainable(model) == {"das_relu_0", "shortcut_1", "conv_1", "classes"}


def test_a_model_inside_a_model_and_what_lies_ahead_of_it():
    gated = keras_das.attach_das(plain_cnn(), **SMALL_GATE)
    inner = keras.Model(gated.input, gated.get_layer("das_p3").output, name="inner")
    image = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(3, 3, padding="same", name="ahead")(image)
    x = keras.layers.Conv2D(2, 1, name="head")(inner(x))
    model = keras.Model(image, x)
    keras_das.freeze_trunk(model)
    assert trainable(model) == {"das_p2", "das_p3", "head"}


def test_two_gated_models_in_a_row():
    """A gate of the second model depends on all layers of the first, also on those after its last gate."""
    image = keras.Input((16, 16, 3))
    x = image
    for name in ("first", "second"):
        inner = keras.Input((16, 16, 3))
        y = keras.layers.Conv2D(3, 1, name=f"{name}_conv")(inner)
        y = keras_das.DASLayer(name=f"{name}_gate", **SMALL_GATE)(y)
        y = keras.layers.Conv2D(3, 1, name=f"{name}_tail")(y)
        x = keras.Model(inner, y, name=name)(x)
    model = keras.Model(image, x)
    keras_das.freeze_trunk(model)
    assert trainable(model) == {"first_gate", "second_gate", "second_tail"}
    keras_das.freeze_trunk(model, False)
    assert all(weight.trainable for weight in model.weights)


class Block(keras.layers.Layer):
    """A layer with a gate inside, whose order of calls is not known."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras.layers.Conv2D(3, 1, name="block_conv")
        self.gate = keras_das.DASLayer(name="block_gate", **SMALL_GATE)

    def build(self, input_shape):
        self.conv.build(input_shape)
        self.gate.build(input_shape)

    def call(self, inputs):
        return self.gate(self.conv(inputs))


def test_gates_in_custom_layers():
    image = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(3, 1, name="stem")(image)
    x = keras_das.DASLayer(name="gate", **SMALL_GATE)(Block()(x))
    model = keras.Model(image, keras.layers.Conv2D(3, 1, name="head")(x))
    keras_das.freeze_trunk(model)
    names = {part for weight in model.trainable_weights for part in weight.path.split("/")}
    assert names & {"stem", "block_conv", "block_gate", "gate", "head"} == {"block_gate", "gate", "head"}


def test_a_model_for_each_time_step():
    gated = keras_das.attach_das(plain_cnn(), **SMALL_GATE)
    image = keras.Input((2, 32, 32, 3))
    x = keras.layers.TimeDistributed(keras.layers.Conv2D(3, 1), name="stem")(image)
    model = keras.Model(image, keras.layers.TimeDistributed(gated)(x))
    keras_das.freeze_trunk(model)
    assert not model.get_layer("stem").trainable
    assert all(
        layer.trainable == (layer.name in ("das_p2", "das_p3", "classes"))
        for layer in gated.layers
        if layer.weights
    )


@pytest.mark.slow
def test_a_classifier_on_a_backbone_trains_and_keeps_its_trunk(rng):
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_das.attach_das(hub_resnet(), **SMALL_GATE)
    classifier = keras_hub.models.ImageClassifier(backbone, num_classes=2)
    keras_das.freeze_trunk(classifier)
    trunk = [weight for weight in classifier.weights if not weight.path.startswith(("das_", "predictions"))]
    before = [np.array(weight) for weight in trunk]  # including the statistics of batch norm
    classifier.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    classifier.fit(images(rng, size=32), np.array([0, 1]), verbose=0)
    for old, weight in zip(before, trunk, strict=True):
        np.testing.assert_array_equal(np.array(weight), old, err_msg=weight.path)
    assert np.abs(backbone.get_layer("das_p3").layer_norm.gamma.numpy()).max() > 0


def gated_sequence(*ahead, **arguments):
    layers = [
        *ahead,
        keras.layers.Conv2D(6, 1, name="trunk"),
        keras_das.DASLayer(name="gate"),
        keras.layers.Conv2D(2, 1, name="head"),
    ]
    return keras.Sequential(layers, **arguments)


def leaves(model):
    """The names of the layers with trainable weights."""
    return {weight.path.split("/")[-2] for weight in model.trainable_weights} & {"stem", "trunk", "head"}


def test_sequential_models():
    model = gated_sequence(keras.Input((8, 8, 3)))
    keras_das.freeze_trunk(model)
    assert leaves(model) == {"head"}
    keras_das.freeze_trunk(model, False)
    assert leaves(model) == {"trunk", "head"}


def test_a_sequential_model_inside_a_model():
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 1, name="stem")(image)
    model = keras.Model(image, gated_sequence(keras.Input((8, 8, 4)))(x))
    keras_das.freeze_trunk(model)
    assert leaves(model) == {"head"}


def test_what_lies_ahead_of_a_model_in_a_sequential_model():
    gated = keras_das.attach_das(plain_cnn(), **SMALL_GATE)
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(3, 1, name="stem"), norm, gated])
    keras_das.freeze_trunk(model)
    assert leaves(model) == set()
    assert not norm.trainable


def test_a_sequential_model_that_is_not_built():
    with pytest.raises(ValueError, match="Build the sequential model 'unbuilt' first"):
        keras_das.freeze_trunk(gated_sequence(name="unbuilt"))


def test_gates_that_are_frozen():
    gated = keras_das.attach_das(plain_cnn(), **SMALL_GATE)
    gated.trainable = False
    with pytest.raises(
        ValueError, match=r"`model` must have trainable gates\. Set `model\.trainable = True`"
    ):
        keras_das.freeze_trunk(gated)
    gated.trainable = True
    keras_das.freeze_trunk(gated)
    assert trainable(gated) == {"das_p2", "das_p3", "classes"}


@pytest.mark.parametrize("make", [plain_cnn, lambda: "model", keras.Model])
def test_a_model_without_gates(make):
    with pytest.raises(ValueError, match=r"`model` must .*Received: model="):
        keras_das.freeze_trunk(make())
