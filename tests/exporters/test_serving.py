"""Tests of serving SavedModels: with TensorFlow's C++ loader, and with TensorFlow Serving's gRPC protocol."""

import subprocess
from concurrent import futures
from pathlib import Path

import grpc
import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

import keras_das
from keras_das.kernels import builder
from tests.exporters.test_saved_model import NAMES, classifier, encode, top
from tests.kernels.stand_in import needs_compiler
from tests.models.backbones import randomize

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).with_name("serve.cc")
NAMED = 5
SIZE = (96, 128)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of a SavedModel, three photographs, and the best classes that Keras predicts for them."""
    folder = tmp_path_factory.mktemp("serving") / "1"
    keras.utils.set_random_seed(40)  # a seed with distinct predictions
    model = classifier(size=SIZE)
    randomize(model, np.random.default_rng(40))
    model.layers[0].kernel.assign(model.layers[0].kernel / 50)  # for pixels from 0 to 255
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    pictures = [np.array(Image.fromarray(pixels).resize(SIZE[::-1])) for pixels in photographs]
    scores = model.predict(np.stack(pictures).astype("float32"), verbose=0)
    in_order = np.sort(scores)[:, ::-1]
    assert (in_order[:, :NAMED] > 1.01 * in_order[:, 1 : NAMED + 1]).all(), scores  # exceeds rounding errors
    keras_das.export(model, folder, labels=NAMES, serving_bytes=True, warmup=(1,))
    names = [[NAMES[index] for index in row] for row in top(scores, NAMED)]
    assert len({tuple(row) for row in names}) == 3  # otherwise, swapped images go unnoticed
    return folder, pictures, names


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled serve.cc, which links only to TensorFlow's libraries."""
    path = tmp_path_factory.mktemp("program") / "serve"
    library = tf.sysconfig.get_lib()
    command = [
        *builder.find_compiler(),
        "-O0",
        str(SOURCE),
        "-o",
        str(path),
        *tf.sysconfig.get_compile_flags(),
    ]
    command += [f"-L{library}", f"-Wl,-rpath,{library}", "-Wl,--no-as-needed"]
    command += ["-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    subprocess.run(command, check=True, timeout=600)
    return path


@needs_compiler
@pytest.mark.parametrize("signature", ["serving_default", "serving_bytes"])
def test_loaded_by_cpp(signature, served, program, tmp_path):
    folder, pictures, names = served
    files = []
    for number, pixels in enumerate(pictures):
        files.append(tmp_path / str(number))
        is_bytes = signature == "serving_bytes"
        files[-1].write_bytes(encode(pixels, "PNG") if is_bytes else pixels.astype("float32").tobytes())
    result = subprocess.run([program, folder, signature, *files], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [line.split("\t") for line in result.stdout.splitlines()] == names


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Answers prediction requests like TensorFlow Serving, with its message types."""

    def __init__(self, folder):
        self.model = tf.saved_model.load(folder)

    def Predict(self, request, context):
        signature = self.model.signatures[request.model_spec.signature_name]
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        response = predict_pb2.PredictResponse()
        for name, value in signature(**inputs).items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return response


@pytest.mark.parametrize("signature", ["serving_default", "serving_bytes"])
def test_over_grpc(signature, served):
    folder, pictures, names = served
    server = grpc.server(futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(folder), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "animals", signature
    if signature == "serving_bytes":
        files = [encode(pixels, "PNG") for pixels in pictures]
        request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(files))
    else:
        request.inputs["image"].CopyFrom(tf.make_tensor_proto(np.stack(pictures).astype("float32")))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            response = stub.Predict(request, timeout=60)
    finally:
        server.stop(None).wait()
    labels = tf.make_ndarray(response.outputs["labels"])
    assert [[name.decode() for name in row] for row in labels] == names
