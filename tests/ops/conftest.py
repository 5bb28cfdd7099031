"""Fixtures of the op's tests."""

import keras
import pytest

from tests.ops.op_cases import IMPLEMENTATIONS

# The test modules here drive TensorFlow; `backend_check.py` is what other backends run.
collect_ignore_glob = [] if keras.backend.backend() == "tensorflow" else ["test_*.py"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation in turn."""
    return request.param
