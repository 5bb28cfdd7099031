"""One contender of bench_export.py in a separate process: `python export_worker.py NAME`."""

import pathlib
import sys

import numpy as np

import harness
from problem import largest_error

PACKAGES = {
    "keras": ("keras-das", "keras", "tensorflow", "tensorflow-cpu"),
    "saved_model": ("tensorflow", "tensorflow-cpu"),
    "onnx": ("onnx", "tf2onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "litert": ("ai-edge-litert",),
}
FILES = {"saved_model": "1", "onnx": "model.onnx", "openvino": "openvino", "litert": "model.tflite"}


class ExportWorker:
    """A ResNet-18, with or without gates, in one of the export formats."""

    def __init__(self, name):
        # "gated" or "plain"; "keras" or a format.
        self.gates, self.form = name.split("-")

    def write(self, folder, batches, image_size):
        """Builds the model and writes it in all formats, with batches and the outputs of Keras."""
        import keras
        import keras_das

        model = _build(self.gates == "gated")
        place = pathlib.Path(folder) / self.gates
        place.mkdir()
        model.save(place / "model.keras")
        for form, file in FILES.items():
            keras_das.export(model, place / file, format=form)
        generator = np.random.default_rng(0)
        for batch in batches:
            images = generator.uniform(-1, 1, (batch, image_size, image_size, 3)).astype(np.float32)
            np.savez(place / f"{batch}.npz", images=images, outputs=keras.ops.convert_to_numpy(model(images)))

    def load(self, folder, batch, threads):
        """Loads the model in its runtime; returns versions and the size of its files in bytes."""
        self.place = pathlib.Path(folder) / self.gates
        with np.load(self.place / f"{batch}.npz") as arrays:
            images, self.expected = arrays["images"], arrays["outputs"]
        path = self.place / FILES.get(self.form, "model.keras")
        self.run = getattr(self, f"_load_{self.form}")(str(path), images, threads)
        self.run()
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return {
            "versions": harness.installed(PACKAGES[self.form]),
            "bytes": sum(file.stat().st_size for file in files),
        }

    def error(self):
        """The largest deviation from the outputs of Keras, relative to the largest output."""
        return largest_error([self.run()], [self.expected])

    def sample(self, seconds):
        return harness.time_calls(self.run, seconds)

    def _load_keras(self, path, images, threads):
        import keras
        import keras_das  # noqa: F401, registers the layers of the file

        model = keras.models.load_model(path, compile=False)
        return lambda: model.predict_on_batch(images)

    def _load_saved_model(self, path, images, threads):
        import tensorflow as tf

        self.loaded = tf.saved_model.load(path)
        serve, tensor = self.loaded.signatures["serving_default"], tf.constant(images)
        return lambda: serve(image=tensor)["output_0"].numpy()

    def _load_onnx(self, path, images, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"image": images})[0]

    def _load_openvino(self, path, images, threads):
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        compiled = openvino.Core().compile_model(f"{path}/model.xml", "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer([images])[0]

    def _load_litert(self, path, images, threads):
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(path, num_threads=threads)
        runner = interpreter.get_signature_runner()
        (name,) = runner.get_input_details()
        return lambda: next(iter(runner(**{name: images}).values()))


def _build(gated):
    import keras
    import keras_das

    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    from examples import backbones

    keras.utils.set_random_seed(0)
    features = backbones.resnet18(None)
    if gated:
        stages = [f"stage{number}" for number in range(1, 5)]
        # Zero offsets would sample whole pixels. These are 0.03 to 0.08 pixels (root mean square).
        offsets = keras.initializers.RandomNormal(stddev=0.05)
        features = keras_das.attach_das(features, stages, identity_init=False, offset_initializer=offsets)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, "softmax")]
    return keras.Sequential([keras.Input((None, None, 3), name="image"), features, *head])


if __name__ == "__main__":
    worker = ExportWorker(sys.argv[1])
    harness.serve({name: getattr(worker, name) for name in ("write", "load", "error", "sample")})
