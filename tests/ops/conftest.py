"""Fixtures of the op's tests."""

import pathlib

import keras
import pytest

from tests.ops.op_cases import IMPLEMENTATIONS

# The test modules here drive TensorFlow, but for the one that runs `backend_check.py` on another backend.
if keras.backend.backend() != "tensorflow":
    modules = pathlib.Path(__file__).parent.glob("test_*.py")
    collect_ignore = [module.name for module in modules if module.name != "test_backends.py"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation in turn."""
    return request.param
