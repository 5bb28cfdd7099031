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


@pytest.mark.parametrize("make", [plain_cnn, lambda: "model", keras.Model])
def test_a_model_without_gates(make):
    with pytest.raises(ValueError, match=r"`model` must .*Received: model="):
        keras_das.freeze_trunk(make())
