"""Tests of the kernels on an NVIDIA GPU.

`make test-gpu` runs them and the tests of all implementations on the GPU.
"""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das.kernels import library
from keras_das.ops import native
from tests.ops import random_cases
from tests.ops.op_cases import Case, assert_as_expected, call, draw, split_upstream
from tests.ops.tf_harness import kernels_value_and_gradients, run, tensors_of

GPUS = tf.config.list_physical_devices("GPU")
REPOSITORY = pathlib.Path(__file__).parents[2]
DEPTHWISE = Case("depthwise", image=(9, 8), groups=4, filters=4, padding="same")
DENSE = Case("dense", image=(9, 8), channels=6, filters=8, groups=2, offset_groups=3, padding="same")

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="TensorFlow sees no GPU"),
    pytest.mark.usefixtures("cuda_kernels"),
]


@pytest.fixture(scope="module")
def cuda_kernels():
    """Requires a library with CUDA kernels."""
    assert library.why_not("tensorflow") == ""
    assert library.cuda_architectures("tensorflow"), 'run "keras-das build --cuda"'


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_results_come_from_the_gpu(rng, mode):
    assert native.why_not({"xla": "XLA"}.get(mode, mode)) == ""
    arguments, _ = split_upstream(tensors_of(draw(DEPTHWISE, rng)))

    def compute(arguments):
        return call(arguments, DEPTHWISE, implementation="native")

    compiled = {
        "eager": compute,
        "graph": tf.function(compute),
        "xla": tf.function(compute, jit_compile=True),
    }[mode]
    assert "GPU" in compiled(arguments).device


@pytest.mark.parametrize(("mode", "count"), [("eager", 2000), ("graph", 20), ("xla", 100)])
def test_random_cases(rng, mode, count):
    def compute(arguments, upstream, threads=None, **options):
        return kernels_value_and_gradients(arguments, upstream, mode=mode, **options)

    random_cases.check(compute, count, rng)


def test_op_determinism_gives_the_same_bits():
    printed = [_run("-m", "tests.ops.determinism") for _ in range(2)]
    assert printed[0] == printed[1]
    assert all(len(line.split()) == 3 for line in printed[0].splitlines())


def test_without_it_all_but_the_inputs_gradient_is_the_same(rng):
    for case in (DEPTHWISE, DENSE):
        tensors = draw(case, rng)
        outputs, gradients = run(case, tensors, implementation="native")
        for _ in range(5):
            others, other_gradients = run(case, tensors, implementation="native")
            np.testing.assert_array_equal(others, outputs)
            for name in gradients.keys() - {"inputs"}:
                np.testing.assert_array_equal(other_gradients[name], gradients[name], err_msg=name)


@pytest.mark.parametrize(
    ("policy", "jit_compile"), [("float32", True), ("mixed_float16", False), ("mixed_bfloat16", True)]
)
def test_models_train(rng, policy, jit_compile):
    layers = [
        keras_das.DASLayer(reduction=0.5, implementation="native", dtype=policy),
        keras_das.DeformableConv2D(
            3, 3, offset_initializer="random_normal", implementation="native", dtype=policy
        ),
        keras.layers.Activation("linear", dtype="float32"),
    ]
    model = keras.Sequential([keras.Input((16, 17, 32)), *layers])
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=jit_compile)
    images, targets = rng.normal(size=(32, 16, 17, 32)), np.tanh(rng.normal(size=(32, 14, 15, 3)))
    losses = model.fit(images, targets, batch_size=8, epochs=4, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_more_elements_than_32_bits_count():
    side = 32_768 + 512  # 2.2e9 elements with 2 channels
    if GPUS and _gpu_memory() < 24 << 30:
        pytest.skip("the GPU has less than 24 GiB of memory")
    corner = tf.reshape(tf.range(8, dtype="float32"), (1, 2, 2, 2))
    inputs = tf.pad(tf.cast(corner, "float16"), [[0, 0], [side - 2, 0], [side - 2, 0], [0, 0]])
    stride = side - 2
    outputs = keras_das.ops.deformable_conv2d(
        inputs, tf.ones((1, 1, 1, 2)), tf.fill((1, 2, 2, 2), 0.5), strides=stride, implementation="native"
    )
    # The last output pixel samples the center of the last four input pixels.
    np.testing.assert_array_equal(outputs[0, 1, 1], np.mean(np.arange(8).reshape(4, 2), axis=0))
    np.testing.assert_array_equal(outputs[0, 0], 0)


def _gpu_memory():
    names = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


needs_two = pytest.mark.skipif(len(GPUS) < 2, reason="there are fewer than two GPUs")


@needs_two
def test_second_gpu(rng):
    tensors = draw(DENSE, rng)
    with tf.device("GPU:1"):
        assert_as_expected(DENSE, tensors, "float32", *run(DENSE, tensors, implementation="native"))


REPLICAS = """
import keras, numpy as np, tensorflow as tf
import keras_das

rng = np.random.default_rng(0)
images, targets = rng.normal(size=(8, 9, 9, 4)).astype("float32"), rng.normal(size=(8, 7, 7, 3))
weights = []
for devices in (["GPU:0", "GPU:1"], ["GPU:0"]):
    strategy = tf.distribute.MirroredStrategy(devices)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([
            keras.Input((9, 9, 4)),
            keras_das.DASLayer(reduction=0.5, implementation="native"),
            keras_das.DeformableConv2D(3, 3, implementation="native"),
        ])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(images, targets, batch_size=4, epochs=2, shuffle=False, verbose=0)
    weights.append(model.get_weights())
for one, other in zip(*weights, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
print("the same")
"""


@needs_two
def test_replicas_train_as_one_does():
    assert _run("-c", REPLICAS).strip().endswith("the same")


def _run(*arguments):
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
