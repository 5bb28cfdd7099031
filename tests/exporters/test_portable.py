"""Tests of models converted by TensorFlow and tf2onnx directly, with and without `keras_das.portable`."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
import tf2onnx
from ai_edge_litert.interpreter import Interpreter
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import keras_das
from keras_das.exporters.saved_model import custom_operations
from keras_das.kernels import library
from tests.exporters.conftest import assert_close

NATIVE = "KerasDas>DeformableConv2D"
SPEC = tf.TensorSpec((None, 4, 4, 3), name="image")


@pytest.fixture
def model():
    """A model that has already been traced with the kernels, if they are available."""
    image = keras.Input((4, 4, 3), name="image")
    x = keras_das.DeformableConv2D(2, 2, offset_initializer="random_normal")(image)
    outputs = keras_das.DASLayer(reduction=1.0, offset_initializer="random_normal", name="features")(x)
    model = keras.Model(image, outputs)
    model.predict(np.zeros((1, 4, 4, 3)), verbose=0)
    return model


@pytest.fixture
def images(rng):
    return rng.normal(size=(2, 4, 4, 3)).astype("float32")


def run_litert(content, images):
    interpreter = Interpreter(model_content=content)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(source["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(target["index"])


def run_onnx(proto, images):
    assert {node.op_type for node in proto.graph.node if not onnx.defs.has(node.op_type)} == set()
    (output,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"image": images})
    return output


def operations(graph):
    definition = graph.as_graph_def()
    nodes = [
        *definition.node,
        *(node for function in definition.library.function for node in function.node_def),
    ]
    return {node.op for node in nodes}


def test_a_model_by_tf_saved_model(model, images, tmp_path):
    tf.saved_model.save(model, str(tmp_path))
    assert custom_operations(tmp_path) == []
    (found,) = tf.saved_model.load(str(tmp_path)).signatures["serving_default"](tf.constant(images)).values()
    assert_close(found.numpy(), model(images).numpy())


@pytest.mark.slow
def test_a_model_by_the_litert_converter(model, images):
    content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    assert_close(run_litert(content, images), model(images).numpy())


def test_a_model_by_tf2onnx(model, images):
    proto, _ = tf2onnx.convert.from_keras(model)
    assert_close(run_onnx(proto, images), model(images).numpy())


@pytest.mark.slow
def test_a_function_by_tf2onnx(model, images):
    proto, _ = tf2onnx.convert.from_function(tf.function(lambda image: model(image)), [SPEC])
    assert_close(run_onnx(proto, images), model(images).numpy())


# Functions that have already been traced


@pytest.fixture
def traced(model):
    with keras_das.portable():
        return tf.function(model).get_concrete_function(SPEC)


def test_a_function_is_traced_with_the_kernels_outside(model, traced):
    if not library.why_not("tensorflow"):
        assert NATIVE in operations(tf.function(model).get_concrete_function(SPEC).graph)
    assert NATIVE not in operations(traced.graph)


def test_a_frozen_graph(traced, model, images):
    frozen = convert_variables_to_constants_v2(traced)
    assert not any(">" in name for name in operations(frozen.graph))
    (found,) = frozen(tf.constant(images))
    assert_close(found.numpy(), model(images).numpy())


def test_a_traced_function_in_an_archive(model, images, tmp_path):
    with keras_das.portable():
        function = tf.function(model)
        function(images)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", function)
    archive.write_out(str(tmp_path), verbose=False)
    assert custom_operations(tmp_path) == []
    loaded = tf.saved_model.load(str(tmp_path))
    assert_close(loaded.serve(images).numpy(), model(images).numpy())


@pytest.mark.slow
def test_a_concrete_function_by_the_litert_converter(traced, model, images):
    # No `trackable_obj`: given a Keras model, TensorFlow would write uninitialized weights.
    content = tf.lite.TFLiteConverter.from_concrete_functions([traced]).convert()
    assert_close(run_litert(content, images), model(images).numpy())


def test_no_library_to_register(monkeypatch):
    def unavailable():
        raise library.LibraryUnavailable("it is not built")

    monkeypatch.setattr(library, "tensorflow_ops", unavailable)
    with pytest.raises(RuntimeError, match="it is not built"):
        keras_das.load_ops()
