"""Random cases of the kernels for 64-bit Arm, compiled by a cross compiler and run by an emulator.

TensorFlow has no library for another processor to link with, so its bindings are not part of the program.
"""

import shutil
import subprocess

import pytest

from keras_das.kernels import targets
from tests.ops import random_cases
from tests.ops.plain_kernels import CSRC, INCLUDES, EmulatedKernels, KernelError

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian installs those of the other processor
SOURCES = ("cpu/kernels.cc", "deformable_conv2d.cc", "parallel.cc", "compatibility.cc")

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program}: install Debian's {package}")
        for program, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user"))
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    program = tmp_path_factory.mktemp("aarch64") / "serve"
    sources = [targets.SOURCES / name for name in SOURCES] + [CSRC / "c_api.cc", CSRC / "serve.cc"]
    options = ["-std=c++17", "-O2", "-pthread", "-DKERAS_DAS_ISA=baseline", *INCLUDES]
    subprocess.run([COMPILER, *options, *map(str, sources), "-o", str(program)], check=True)
    kernels = EmulatedKernels([EMULATOR, "-L", LIBRARIES, str(program)])
    yield kernels
    assert kernels.close() == 0


def test_random_cases(emulated, rng):
    random_cases.check(emulated.value_and_gradients, 200, rng)


def test_wrong_shapes_are_refused(emulated):
    with pytest.raises(KernelError, match="offset_groups"):
        emulated.geometry((1, 8, 8, 3), (3, 3, 3, 4), 1, "same", 1, offset_groups=2)
