"""Tests of the LiteRT exporter: built-in operations only, numerical agreement with Keras, and errors."""

import keras
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_das
from tests.exporters.conftest import assert_close, many_convolutions


def run(path, images):
    """Runs the model with the LiteRT runtime alone, which does not support TensorFlow operations."""
    interpreter = Interpreter(str(path))
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(source["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(target["index"])


@pytest.mark.slow
def test_residual_network_with_four_gates(residual_network, expected, tmp_path):
    path = tmp_path / "model.tflite"
    keras_das.export(residual_network, path, format="litert")
    for images, outputs in expected:
        assert_close(run(path, images), outputs)


@pytest.mark.slow
def test_every_kind_of_convolution(tmp_path, rng):
    check_export(many_convolutions()[0], tmp_path, rng)


def test_one_convolution(tmp_path, rng):
    """Uses two taps, because tracing and conversion time grows with the number of taps."""
    offsets = keras.initializers.RandomUniform(-0.5, 0.5)
    arguments = {"strides": 2, "padding": "same", "offset_initializer": offsets}
    layer = keras_das.DeformableConv2D(4, (1, 2), **arguments)
    check_export(keras.Sequential([keras.Input((None, None, 3), name="image"), layer]), tmp_path, rng)


@pytest.fixture
def double_precision():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def test_another_default_precision(double_precision, tmp_path, rng):
    image = keras.Input((None, None, 3), name="image", dtype="float32")
    layer = keras_das.DASLayer(reduction=0.5, kernel_size=1)
    check_export(keras.Sequential([image, layer]), tmp_path, rng)


@pytest.mark.parametrize("size", [4, 6, None])
def test_a_gate_is_one_lookup(size, tmp_path, rng):
    """If the sizes of the image are known, the graph computes none, which would disable fast kernels."""
    arguments = {"kernel_size": (1, 2), "dilation_rate": 2, "offset_initializer": "random_normal"}
    gate = keras_das.DASLayer(reduction=0.5, **arguments)
    model = keras.Sequential([keras.Input((size, size, 6), name="image"), gate])
    keras_das.export(model, tmp_path / "model.tflite", format="litert")
    images = rng.normal(size=(3, size or 9, size or 7, 6)).astype("float32")
    assert_close(run(tmp_path / "model.tflite", images), model(images).numpy())
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    operations = {node["op_name"] for node in interpreter._get_ops_details()}  # there is no public way
    assert {"GATHER", "BATCH_MATMUL"} <= operations
    assert {"WHILE", "SPACE_TO_BATCH_ND"}.isdisjoint(operations)
    assert ("SHAPE" in operations) == (size is None)


def check_export(model, tmp_path, rng):
    keras_das.export(model, tmp_path / "model.tflite", format="litert")
    for shape in [(2, 32, 32, 3), (1, 37, 45, 3)]:
        images = rng.normal(size=shape).astype("float32")
        assert_close(run(tmp_path / "model.tflite", images), model(images).numpy())


def test_what_litert_does_not_have(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(keras.ops.erfinv)])
    with pytest.raises(ValueError, match=r"`model` cannot be written as LiteRT: Custom ops: Erfinv"):
        keras_das.export(model, tmp_path / "model.tflite", format="litert")
    assert list(tmp_path.iterdir()) == []
