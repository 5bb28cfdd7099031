"""What every test shares: quiet logs, and a fresh but repeatable seed."""

import gc
import os
import secrets
import zlib

# Before anything imports Keras or TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

SEED_VARIABLE = "KERAS_DAS_TEST_SEED"
# In the environment, so that the processes which share the tests' work have the same.
SESSION_SEED = int(os.environ.setdefault(SEED_VARIABLE, str(secrets.randbits(32))))


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    return f"{SEED_VARIABLE}={SESSION_SEED}"


@pytest.fixture
def rng(request):
    """NumPy's generator for one test: new numbers each session, the same ones for the same session seed."""
    print(f"to repeat: {SEED_VARIABLE}={SESSION_SEED}")  # shown by pytest when the test fails
    return np.random.default_rng([SESSION_SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(autouse=True, scope="session")
def _without_tf32():
    """Matrix products in TF32, which TensorFlow takes for float32 on GPUs, are beyond the oracles' bounds."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)


@pytest.fixture(autouse=True)
def _seed_keras(request):
    """Initializers and dropout draw the same numbers whichever tests ran before."""
    import keras

    keras.utils.set_random_seed(zlib.crc32(request.node.nodeid.encode()) % 2**31)
