"""One contender of bench_op.py in a separate process: `python op_worker.py NAME`."""

import functools
import importlib
import sys

import numpy as np

import harness
from contenders import CONTENDERS
from problem import Problem, largest_error

_problem = functools.lru_cache(1)(Problem)  # successive modes share a problem


class OpWorker:
    """The methods that bench_op.py calls."""

    def __init__(self, contender):
        self.contender = contender

    def load(self, threads, device="cpu"):
        """Imports the contender and returns versions."""
        self.threads = threads
        self.wait = harness.wait_for_gpu if device == "gpu" else None
        self.module = importlib.import_module(f"contenders.{self.contender.module}")
        return harness.installed(self.module.VERSIONS)

    def prepare(self, operation, shape, mode, dtype="float32"):
        """Sets the contender up for a problem, in place of the one before, and runs it once."""
        self.run = self.collect = None
        self.problem, self.mode = _problem(operation, shape, dtype), mode
        self.run, self.collect = self._prepare(self.problem)
        self.run()

    def save(self, path):
        """Writes the results, for comparison."""
        np.savez(path, *self.collect(self.run()))

    def error(self, path):
        """The deviation of the results from those of a file."""
        with np.load(path) as expected:
            return largest_error(self.collect(self.run()), expected.values())

    def sample(self, seconds):
        """Milliseconds of single calls."""
        calls = self.contender.options.get("calls", 1)
        return [took / calls for took in harness.time_calls(self.run, seconds, self.wait)]

    def device(self):
        """The kind of device of the results: "CPU" or "GPU"."""
        result = self.run()[0]
        if hasattr(result, "is_cuda"):  # torch
            return "GPU" if result.is_cuda else "CPU"
        # TensorFlow's are strings that end in "GPU:0", and JAX's are objects with a platform.
        device = getattr(result, "device", "")
        return "GPU" if "GPU" in getattr(device, "platform", str(device)).upper() else "CPU"

    def copy_rate(self):
        """Bytes that the GPU reads and writes a second when it copies a tensor."""
        milliseconds = harness.time_calls(self.module.copy(1 << 28), 0.5, harness.wait_for_gpu)
        # Twice the tensor's size: it is read, and written.
        return 2 * 4 * (1 << 28) / (1e-3 * min(milliseconds))

    def memory(self, operation, shape, mode):
        """Peak memory during a run in bytes, beyond the tensors of the problem and the results.

        This includes memory that is kept between calls, as only a small problem runs before. Contenders that
        compile run once before.
        """
        self.prepare(operation, "1x4x4x3", mode)
        if self.contender.options["how"] == "eager":
            self.problem = Problem(operation, shape)
            self.run, _ = self._prepare(self.problem)
        else:
            self.prepare(operation, shape, mode)
        rise, _ = harness.memory_rise(self.run)
        return rise - self.problem.result_bytes(mode)

    def _prepare(self, problem):
        prepare = functools.partial(self.module.prepare, problem, self.mode, self.threads)
        return prepare(**self.contender.options)


if __name__ == "__main__":
    worker = OpWorker(CONTENDERS[sys.argv[1]])
    names = ("load", "prepare", "save", "error", "sample", "memory", "device", "copy_rate")
    harness.serve({name: getattr(worker, name) for name in names})
