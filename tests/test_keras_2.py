"""Tests with Keras 2 (tf_keras) objects: every public function raises an error that says how to proceed."""

import numpy as np
import pytest

import keras_das

MESSAGE = r"must be a Keras 3 object\. Received: .* of the Keras 2 class {}\. Build the model with Keras 3"
IMAGE = np.zeros((8, 8, 3), "float32")


def legacy(name):
    """An instance of a class that appears to derive from a tf_keras class. tf_keras need not be installed."""
    base = type("Base", (), {"__module__": "tf_keras.src.engine.base_layer", "dtype": "float32"})
    return type(name, (base,), {})()


@pytest.mark.parametrize(
    "function",
    [
        keras_das.attach_das,
        lambda model: keras_das.export(model, "never-written"),
        lambda model: keras_das.visualize.sampling_points(model, IMAGE, "gate", (1, 1)),
        lambda model: keras_das.visualize.stacked_sampling_points(model, IMAGE, ["gate"], (1, 1)),
        lambda model: keras_das.visualize.gate_map(model, IMAGE, "gate"),
        lambda model: keras_das.visualize.gate_inputs(model, IMAGE[None]),
        lambda model: keras_das.visualize.grad_cam(model, IMAGE, "gate"),
        lambda model: keras_das.visualize.plot_gates(model, [IMAGE]),
        lambda model: keras_das.visualize.plot_sampling_points(model, IMAGE, "gate", (1, 1)),
        lambda model: keras_das.visualize.plot_grad_cam({"gates": (model, "gate")}, IMAGE),
    ],
)
def test_models(function):
    with pytest.raises(ValueError, match=MESSAGE.format("Classifier")):
        function(legacy("Classifier"))


@pytest.mark.parametrize("layer", [keras_das.DASLayer(), keras_das.DeformableConv2D(4, 3)])
def test_symbolic_tensors(layer):
    """Without an error, Keras 2 records the call as a plain function and does not train its weights."""
    with pytest.raises(ValueError, match=MESSAGE.format("KerasTensor")):
        layer(legacy("KerasTensor"))
    with pytest.raises(ValueError, match=MESSAGE.format("KerasTensor")):
        layer(inputs=legacy("KerasTensor"))
    assert not layer.built


@pytest.mark.slow
def test_the_real_keras_2():
    tf_keras = pytest.importorskip("tf_keras")
    inputs = tf_keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match=MESSAGE.format("KerasTensor")):
        keras_das.DASLayer()(inputs)
    with pytest.raises(ValueError, match=MESSAGE.format("Functional")):
        keras_das.attach_das(tf_keras.Model(inputs, tf_keras.layers.Conv2D(4, 3)(inputs)))
