"""Tests of the op with a missing or broken library: correct results, and at most one log message."""

import pytest

from keras_das.kernels import library, targets
from tests import processes
from tests.kernels.stand_in import damage_nothing, forge, put_another_version_s, truncate

OPERATION = """
import logging, sys
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
handler.setLevel("WARNING")
logging.getLogger("keras_das").addHandler(handler)

import numpy as np
from tests.ops.op_cases import Case, assert_as_expected, call, draw, split_upstream
from tests.ops.tf_harness import run

case = Case("", padding="same", groups=2)
tensors = draw(case, np.random.default_rng(0))
for mode in sys.argv[1:]:
    assert_as_expected(case, tensors, "float32", *run(case, tensors, mode, implementation="auto"))
print(len(warnings), "warnings:", *warnings)
try:
    call(split_upstream(tensors)[0], case, implementation="native")
    print("native: works")
except RuntimeError as error:
    print("native:", error)
"""


def run_operation(tmp_path, *modes, **environment):
    """Runs the op in a subprocess and returns its output.

    The first line lists the warnings, and the second is the result of `implementation="native"`.
    """
    code = (
        "import pathlib\nfrom keras_das.kernels import library\n"
        'library._PREBUILT = pathlib.Path("/no/such/folder")\n' + OPERATION
    )
    result = processes.python(code, *modes, folder=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("modes", [["eager"], pytest.param(["graph", "xla"], marks=pytest.mark.slow)])
def test_op_without_compiler_and_without_cache(tmp_path, modes):
    """Without a compiler and a library, the reference returns correct results and logs nothing."""
    nothing = {"PATH": "", "CXX": "", library.CACHE_VARIABLE: str(tmp_path / "empty")}
    warnings, native = run_operation(tmp_path, *modes, **nothing)
    assert warnings == "0 warnings:"
    assert native.startswith('native: implementation="native" cannot be used: the kernel library')
    assert 'is not built: run "keras-das build"' in native
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing,
        *(
            pytest.param(damage, marks=pytest.mark.slow)
            for damage in (truncate, put_another_version_s, "folder")
        ),
    ],
)
def test_op_with_a_broken_library(tmp_path, damage):
    """`damage_nothing` leaves a library that passes all checks but cannot be loaded."""
    cache = tmp_path / "cache"
    if damage == "folder":
        cache.touch()
        cache = cache / "below_a_file"
    else:
        damage(forge(targets.target("tensorflow"), cache))
    warnings, native = run_operation(tmp_path, "eager", "graph", **{library.CACHE_VARIABLE: str(cache)})
    assert warnings.startswith("1 warnings: keras_das uses its reference implementation: ")
    reason = warnings.partition("implementation: ")[2]
    assert str(cache) in reason
    assert native.startswith(f'native: implementation="native" cannot be used: {reason}')
