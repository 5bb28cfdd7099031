"""Builds the kernels with sanitizers and compares them with the oracle: `make sanitize`.

Each build runs random cases with every instruction set that the machine supports. The process loads no
framework, so that all reports concern the kernels: accesses out of bounds, undefined behavior, and data
races.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

from keras_das.kernels import compilers, targets
from tests.ops.plain_kernels import CSRC, INCLUDES

_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fno-omit-frame-pointer",
    "-Wno-psabi",
    *INCLUDES,
    *targets.architecture_flags(),
)
BUILDS = {
    # name: compiler flags, runtime library to preload, sanitizer options
    "address,undefined": (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},  # Python never frees some memory
    ),
    "thread": (("-fsanitize=thread",), "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1"}),
}


def compile_kernels(folder, compiler, flags=()):
    """Builds a library that contains c_api.cc with `flags` and returns its path."""
    objects = []
    for unit in (*targets.kernel_units(), targets.Unit(str(CSRC / "c_api.cc"))):
        to = pathlib.Path(folder) / f"{unit}.o".replace(" ", "_")
        source = targets.SOURCES / unit.source
        command = [*compiler, *_FLAGS, *flags, *unit.flags, "-c", str(source), "-o", str(to)]
        subprocess.run(command, check=True)
        objects.append(str(to))
    path = pathlib.Path(folder) / "libkernels.so"
    subprocess.run([*compiler, *flags, "-shared", "-pthread", *objects, "-o", str(path)], check=True)
    return path


def run_cases(path, isa, count, seed, environment=None):
    """Runs random cases with the library at `path` in a subprocess and returns the exit status."""
    command = [
        sys.executable,
        "-m",
        "tests.ops.random_cases",
        str(path),
        "--count",
        str(count),
        "--seed",
        str(seed),
    ]
    return subprocess.run(command, env={**os.environ, "KERAS_DAS_ISA": isa, **(environment or {})}).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="random cases for each instruction set")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    compiler = compilers.find_compiler()
    failed = []
    for name, (flags, runtime, environment) in BUILDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = compile_kernels(folder, compiler, flags)
            found = subprocess.run([*compiler, f"-print-file-name={runtime}"], capture_output=True, text=True)
            environment = {**environment, "LD_PRELOAD": found.stdout.strip()}
            for unit in targets.kernel_units():
                if unit.variant:
                    print(f"{name}, {unit.variant}: ", end="", flush=True)
                    if run_cases(path, unit.variant, options.count, options.seed, environment):
                        failed.append(f"{name}, {unit.variant}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
