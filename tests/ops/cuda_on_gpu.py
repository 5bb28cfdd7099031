"""Tests the CUDA kernels on a GPU without a framework, for a fast start even under compute-sanitizer.

    python -m tests.ops.cuda_on_gpu build LIBRARY
    python -m tests.ops.cuda_on_gpu run LIBRARY [--count 500] [--seed 0]

Compares each problem with the oracle. The settings are random: atomic or deterministic sums, the size of the
working memory, the number of blocks, and the alignment of the tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import pathlib
import subprocess
import tempfile

import numpy as np

from keras_das.kernels import compilers, targets
from tests.ops.op_cases import CASES, DTYPES, Case, assert_as_expected, draw, split_upstream
from tests.ops.plain_kernels import CSRC, INCLUDES, CudaKernelsOnHost, KernelError
from tests.ops.random_cases import random_case

SETTINGS = {
    "deterministic": (False, True),
    "workspace_bytes": (64 << 20, 64 << 20, 20_000),
    "most_blocks": (1 << 20, 1 << 20, 7),
    "shift": (0, 0, 0, 1),
}


def build(path: pathlib.Path, nvcc: compilers.Nvcc, architectures: tuple[str, ...]) -> None:
    """Builds a library with the CUDA kernels, the functions for plain_kernels.py, and cuda_on_gpu.cc."""
    common = [nvcc.command, "-std=c++17", "-O3", "-Xcompiler=-fPIC", *INCLUDES]
    cuda = ["-x", "cu", f'-DKERAS_DAS_CUDA="{",".join(architectures)}"']
    units = {
        targets.SOURCES / "cuda/kernels.cu.cc": [*cuda, *compilers.architecture_flags(architectures)],
        CSRC / "cuda_on_gpu.cc": [],
        CSRC / "c_api.cc": [],
        targets.SOURCES / "deformable_conv2d.cc": [],
        targets.SOURCES / "parallel.cc": [],
        targets.SOURCES / "cpu/kernels.cc": ["-DKERAS_DAS_ISA=baseline"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{source.name}.o" for source in units]
        for (source, flags), made in zip(units.items(), objects, strict=True):
            subprocess.run([*common, *flags, "-c", str(source), "-o", made], check=True)
        subprocess.run([nvcc.command, "-shared", "-cudart=static", *objects, "-o", str(path)], check=True)


class CudaKernelsOnGpu(CudaKernelsOnHost):
    """The kernels of a library built by `build`."""

    def run(self, direction, dtype, geometry, arrays, threads):
        blocks, sizes, starts = zip(*map(self._block_of, arrays), strict=True)
        count, message = len(arrays), ctypes.create_string_buffer(1000)
        numbers = ctypes.c_int64 * count
        settings = (ctypes.c_int64 * 3)(int(self.deterministic), self.workspace_bytes, self.most_blocks)
        function = self.library.keras_das_on_gpu
        function.restype = ctypes.c_int64
        self.taken[direction] = function(
            int(direction == "backward"),
            dtype,
            geometry,
            count,
            (ctypes.c_void_p * count)(*blocks),
            numbers(*sizes),
            numbers(*starts),
            settings,
            message,
            ctypes.c_int64(1000),
        )
        if message.value:
            raise KernelError(message.value.decode())

    def _block_of(self, array):
        """Returns the address and size in bytes of the block of a tensor, and the tensor's position in it."""
        if array is None:
            return None, 0, 0
        for whole, start, _ in self._placed:
            if whole.ctypes.data + start * whole.itemsize == array.ctypes.data:
                return whole.ctypes.data, whole.nbytes, start * whole.itemsize
        raise AssertionError("a tensor that was not placed")


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def wide_case(rng):
    """A geometry with enough channels for vectorized loads and for several tiles of results."""
    offset_groups = pick(rng, (1, 1, 2, 4))
    channels = offset_groups * pick(rng, (8, 16, 24, 51, 64, 65))
    groups = pick(rng, (1, 1, 2)) if channels % 2 == 0 else 1
    filters = groups * pick(rng, (8, 33, 64, 140))
    if rng.random() < 0.5:
        groups = filters = channels
    return Case(
        "wide",
        image=(int(rng.integers(5, 20)), int(rng.integers(5, 20))),
        channels=channels,
        filters=filters,
        groups=groups,
        kernel_size=pick(rng, [(3, 3), (3, 3), (1, 1), (5, 5), (2, 3)]),
        padding="same",
        strides=pick(rng, (1, 1, 2)),
        offset_groups=offset_groups,
        modulated=bool(rng.random() < 0.8),
        use_bias=bool(rng.random() < 0.5),
    )


def run(path: pathlib.Path, count: int, seed: int) -> None:
    """Runs the named cases and `count` random ones, a quarter of which are wide."""
    kernels, rng = CudaKernelsOnGpu(path), np.random.default_rng(seed)
    named = [case for case in CASES if case.batch]
    drawn = [wide_case(rng) if number % 4 == 0 else random_case(rng) for number in range(count)]
    for case in [*named, *drawn]:
        dtype, settings = pick(rng, DTYPES), {name: pick(rng, choices) for name, choices in SETTINGS.items()}
        for name, value in settings.items():
            setattr(kernels, name, value)
        tensors = draw(case, rng, dtype)
        results = kernels.value_and_gradients(*split_upstream(tensors), **case.options)
        try:
            assert_as_expected(case, tensors, dtype, *results)
        except AssertionError as error:
            raise AssertionError(f"{case!r}, {settings}: {error}") from error
    print(f"{len(named) + count} problems agree with the oracle")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=["build", "run"])
    parser.add_argument("library", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = options.library.absolute()
    if options.do == "build":
        nvcc = compilers.find_nvcc()
        build(path, nvcc, compilers.architectures(nvcc, None))
    else:
        run(path, options.count, options.seed)


if __name__ == "__main__":
    main()
