"""Tests of the op with other Keras backends.

Each backend runs in a subprocess, because Keras selects its backend at import.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import pytest

SCRIPT = pathlib.Path(__file__).with_name("backend_check.py")


# The other modules test TensorFlow, so this one tests JAX unless another backend is selected.
BACKEND = "jax" if keras.backend.backend() == "tensorflow" else keras.backend.backend()


@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [BACKEND])
def test_backend(backend, tier):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, str(SCRIPT)],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=SCRIPT.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
