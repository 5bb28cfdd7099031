"""Compiles and links the CUDA kernels, and checks the result on a machine without a GPU: `make cuda`.

The given folder keeps the libraries for later runs.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

from keras_das.kernels import builder, compilers, library, targets
from tests.ops import cuda_on_gpu

OLDEST, NEWEST = "sm_75", "sm_90"  # supported architectures between which the code differs
LOADED = """
import sys
from tensorflow.python.framework import kernels
from keras_das.kernels import library
from keras_das.ops import native

assert library.path("tensorflow") is None
library.tensorflow_ops()
assert str(library.path("tensorflow")) == sys.argv[1], library.path("tensorflow")
assert library.cuda_architectures("tensorflow") == sys.argv[2]
assert "driver" in library.cuda_problem("tensorflow"), library.cuda_problem("tensorflow")
for op in ("KerasDas>DeformableConv2D", "KerasDas>DeformableConv2DGrad"):
    devices = {kernel.device_type for kernel in kernels.get_registered_kernels_for_op(op).kernel}
    assert devices == {"CPU", "GPU", "XLA_CPU_JIT", "XLA_GPU_JIT"}, devices
for context in native.CONTEXTS:
    assert native.why_not(context) == "", native.why_not(context)
print("loads without a GPU; kernels for CPU, GPU, and XLA on both")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="where libraries are kept")
    folder = parser.parse_args().folder.absolute()
    try:
        nvcc = compilers.find_nvcc()
    except compilers.NoCompiler as error:
        print(f"make cuda left out: {error}")
        return
    oldest = min(name for name in (OLDEST, NEWEST) if name in nvcc.known)
    chosen = tuple(dict.fromkeys((oldest, NEWEST, NEWEST.replace("sm", "compute"))))
    # The kernels are the same in all three libraries, so one is built for all architectures.
    file = builder.build(targets.target("tensorflow").for_gpus(chosen), folder, report=_report)
    builder.build(targets.target("jax").for_gpus((NEWEST,)), folder, report=_report)
    cuda_on_gpu.build(folder / "cuda_on_gpu.so", nvcc, (NEWEST,))
    environment = {**os.environ, library.CACHE_VARIABLE: str(folder), "CUDA_VISIBLE_DEVICES": "-1"}
    python = [sys.executable, "-c", LOADED, str(file), ",".join(chosen)]
    for command in (
        python,
        [sys.executable, "-m", "tests.ops.random_cases", "eager", "--count", "100"],
        [sys.executable, "-m", "tests.ops.random_cases", "xla", "--count", "10"],
        [sys.executable, "-m", "tests.ops.random_cases", "jax", "--count", "10"],
    ):
        subprocess.run(command, check=True, env=environment)


def _report(line):
    print(line, flush=True)


if __name__ == "__main__":
    main()
