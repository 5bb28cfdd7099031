"""Settings for all tests: minimal logging and reproducible random seeds."""

import gc
import os
import secrets
import zlib

# Must be set before Keras or TensorFlow is imported.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

SEED_VARIABLE = "KERAS_DAS_TEST_SEED"
# Stored in the environment, so that all worker processes use the same seed.
SESSION_SEED = int(os.environ.setdefault(SEED_VARIABLE, str(secrets.randbits(32))))


def pytest_collection_finish():
    """Excludes imported modules from garbage collection, since they are never freed."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    return f"{SEED_VARIABLE}={SESSION_SEED}"


@pytest.fixture
def rng(request):
    """A NumPy generator for one test, seeded by the session.

    Each session draws a new seed by default. The same session seed yields the same numbers.
    """
    print(f"to repeat: {SEED_VARIABLE}={SESSION_SEED}")  # pytest shows this if the test fails
    return np.random.default_rng([SESSION_SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(autouse=True, scope="session")
def _without_tf32():
    """Disables TF32.

    TensorFlow uses it for float32 matrix products on GPUs. Its rounding errors exceed the tests' tolerances.
    """
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)


@pytest.fixture(autouse=True)
def _seed_keras(request):
    """Makes initializers and dropout independent of the order of the tests."""
    import keras

    keras.utils.set_random_seed(zlib.crc32(request.node.nodeid.encode()) % 2**31)
