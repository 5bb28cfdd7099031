"""Tests of the OpenVINO exporter: node types, numerical agreement with Keras, and errors."""

import sys

import keras
import numpy as np
import openvino
import pytest
import tensorflow as tf

import keras_das
from tests.exporters.conftest import assert_close, many_convolutions


def compiled(folder):
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors default to bfloat16
    return openvino.compile_model(str(folder / "model.xml"), "CPU", options)


def deformable_convolutions(folder):
    operations = openvino.Core().read_model(str(folder / "model.xml")).get_ops()
    return [of for of in operations if of.get_type_name() == "DeformableConvolution"]


@pytest.mark.slow
def test_residual_network_with_four_gates(residual_network, expected, tmp_path):
    folder = tmp_path / "model"
    keras_das.export(residual_network, folder, format="openvino")
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", "model.xml"]
    assert len(deformable_convolutions(folder)) == 4
    network = compiled(folder)
    for images, outputs in expected:
        assert_close(network({"image": images})["output_0"], outputs)


def test_every_kind_of_convolution(tmp_path, rng):
    model, count = many_convolutions()
    keras_das.export(model, tmp_path / "model", format="openvino")
    assert len(deformable_convolutions(tmp_path / "model")) == count
    network = compiled(tmp_path / "model")
    for shape in [(2, 32, 32, 3), (1, 37, 45, 3)]:
        images = rng.normal(size=shape).astype("float32")
        assert_close(network({"image": images})["output_0"], model(images).numpy())


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (32, 1), (70, 70)])
def test_depthwise_convolutions_of_few_channels_are_one_group(channels, groups, tmp_path, rng):
    layer = keras_das.DeformableConv2D(
        channels, 3, padding="same", groups=channels, offset_initializer="random_normal"
    )
    model = keras.Sequential([keras.Input((None, None, channels)), layer])
    keras_das.export(model, tmp_path / "model", format="openvino")
    (node,) = deformable_convolutions(tmp_path / "model")
    assert node.get_attributes()["group"] == groups
    images = rng.normal(size=(2, 6, 7, channels)).astype("float32")
    assert_close(compiled(tmp_path / "model")(images)[0], model(images).numpy())


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ImportError, match=r"requires openvino: pip install 'keras-das\[export\]'"):
        keras_das.export(model, tmp_path / "model", format="openvino")
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_outputs_are_the_model_s(tmp_path, rng):
    """Inputs and outputs are accessed by position, in Keras' order. Constants of layers are not inputs."""
    rgb, depth = keras.Input((4, 4, 3), name="rgb"), keras.Input((4, 4, 3), name="depth")
    normalization = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0])
    features = keras_das.DeformableConv2D(2, 1)(keras.layers.Subtract()([normalization(rgb), depth]))
    model = keras.Model([rgb, depth], [features * n for n in range(12)])
    keras_das.export(model, tmp_path / "model", format="openvino")
    network = compiled(tmp_path / "model")
    assert [port.get_any_name() for port in network.inputs] == ["rgb", "depth"]
    assert [port.get_any_name() for port in network.outputs] == [f"output_{n}" for n in range(12)]
    values = [rng.normal(size=(2, 4, 4, 3)).astype("float32") for _ in range(2)]
    for number, wanted in enumerate(model(values)):
        np.testing.assert_allclose(network(values)[number], wanted, rtol=1e-4, atol=1e-4)


def test_in_a_strategy_s_scope(tmp_path, rng):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = keras.Sequential([keras.Input((4, 4, 3)), keras_das.DeformableConv2D(2, 1)])
        keras_das.export(model, tmp_path / "model", format="openvino")
    images = rng.normal(size=(2, 4, 4, 3)).astype("float32")
    assert_close(compiled(tmp_path / "model")(images)[0], model(images).numpy())
