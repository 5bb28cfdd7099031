"""Fixtures for the tests of the op."""

import os
import pathlib

import keras
import pytest

from keras_das.kernels import library, targets
from tests.ops.op_cases import IMPLEMENTATIONS

# The test modules require TensorFlow, except the one that runs `backend_check.py` with another backend.
if keras.backend.backend() != "tensorflow":
    modules = pathlib.Path(__file__).parent.glob("test_*.py")
    collect_ignore = [module.name for module in modules if module.name != "test_backends.py"]


@pytest.fixture(scope="session")
def kernels():
    """Skips tests of the kernels if they are not built. `make test` builds them.

    A broken library is an error, and so is a missing one with `KERAS_DAS_TEST_KERNELS=required`.
    """
    backend = keras.backend.backend()
    if backend not in targets.FRAMEWORKS:
        pytest.skip(f"there are no kernels for Keras' {backend} backend")
    reason = library.why_not(backend)
    if any(why in reason for why in ("is not built", "for Linux only")):
        assert os.environ.get("KERAS_DAS_TEST_KERNELS") != "required", reason
        pytest.skip(reason)
    assert not reason


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skips the tests of the kernels in XLA programs if TensorFlow lacks the header that they require."""
    try:
        return (yield)
    except RuntimeError as error:
        problem = keras.backend.backend() == "tensorflow" and targets.xla_problem()
        if problem and problem in str(error):
            pytest.skip(problem)
        raise


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Parametrizes a test with each implementation."""
    if request.param == "native":
        request.getfixturevalue("kernels")
    return request.param
