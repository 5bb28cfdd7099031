"""One contender of bench_model.py in a separate process: `python model_worker.py NAME`."""

import sys

import numpy as np

import harness
from problem import largest_error


class ModelWorker:
    """A network, with gates or without, compiled by XLA or not; what bench_model.py can ask of it."""

    def __init__(self, name):
        # "none", "native" or "reference"; "graph" or "xla".
        self.implementation, self.compiler = name.split("-")

    def load(self, mode, network, batch, image_size, device="cpu", policy="float32"):
        """Builds the model and takes two steps; the versions of what it runs on."""
        import keras
        import keras_das
        import tensorflow as tf

        self.gpu = device == "gpu"
        if self.gpu and not tf.config.list_physical_devices("GPU"):
            raise RuntimeError("TensorFlow sees no GPU")
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)  # so that all have the same weights and data
        base = _build(network, (image_size, image_size, 3))
        model = base
        if self.implementation != "none":
            # The paper's gate, because a gate of exactly 1 (`identity_init`) would hide a wrong convolution.
            model = keras_das.attach_das(base, identity_init=False, implementation=self.implementation)
        model.compile(
            keras.optimizers.SGD(1e-3, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=self.compiler == "xla",
        )
        generator = np.random.default_rng(0)
        images = generator.uniform(0, 255, (batch, image_size, image_size, 3)).astype(np.float32)
        labels = generator.integers(0, 1000, batch)
        if self.gpu:  # places the data on the device before the step
            images, labels = tf.constant(images), tf.constant(labels)
        if mode == "inference":
            self.run = lambda: model.predict_on_batch(images)
        else:
            self.run = lambda: np.asarray(model.train_on_batch(images, labels))
        self.first = self.run()  # logits, or the loss at the initial weights
        self.run()
        return {
            "versions": harness.installed(("keras-das", "keras", "tensorflow", "tensorflow-cpu")),
            "parameters": model.count_params(),
        }

    def save(self, path):
        """Writes the result of the first step, for comparison."""
        np.savez(path, self.first)

    def error(self, path):
        """The deviation of the result of the first step from that of a file."""
        with np.load(path) as expected:
            return largest_error([self.first], expected.values())

    def sample(self, seconds):
        return harness.time_calls(self.run, seconds)

    def memory(self):
        """The peak memory of the process during a step, in bytes."""
        if self.gpu:
            import tensorflow as tf

            tf.config.experimental.reset_memory_stats("GPU:0")
            self.run()
            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
        _, peak = harness.memory_rise(self.run)
        return peak


def _build(network, shape):
    """A classifier of `keras.applications`, or "tiny", which XLA compiles in seconds, for rehearsals."""
    import keras

    if network != "tiny":
        make = getattr(keras.applications, network)
        return make(weights=None, input_shape=shape, classifier_activation=None)
    layers = [keras.layers.Conv2D(16, 3, 2, "same", activation="relu") for _ in range(3)]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1000)]
    return keras.Sequential([keras.Input(shape), *layers, *head])


if __name__ == "__main__":
    worker = ModelWorker(sys.argv[1])
    harness.serve({name: getattr(worker, name) for name in ("load", "save", "error", "sample", "memory")})
