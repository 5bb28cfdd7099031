"""Runs contenders in separate processes and environments, and times them alternately.

The benchmark starts `Worker`s and calls their methods; the worker's script answers with `serve`. This module
uses only the standard library, because it is imported in the environment of every contender.
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback

HERE = pathlib.Path(__file__).parent
ENVIRONMENTS = pathlib.Path(os.environ.get("KERAS_DAS_BENCHMARK_ENVS", HERE / ".envs"))
# On a GPU: the first one unless the caller selects others, with memory allocated on demand, as workers share
# it.
DEVICES = {
    "cpu": {"CUDA_VISIBLE_DEVICES": "-1"},
    "gpu": {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
# Returns freed memory to the system; otherwise, peaks exclude memory that was kept from earlier calls.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # its allocator keeps freed memory
}


class Failed(Exception):
    """A contender cannot run, with the reason."""


class Worker:
    """A contender's process."""

    def __init__(self, name, script, threads, environment="", settings=None):
        """Starts `script NAME` in an environment on a number of cores."""
        self.name = name
        python = _python(environment)
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed when the process ends
        self._process = subprocess.Popen(
            [python, HERE / script, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                **DEVICES["cpu"],
                "KERAS_BACKEND": "tensorflow",
                "OMP_NUM_THREADS": str(threads),
                "TF_CPP_MIN_LOG_LEVEL": "2",
                "TF_NUM_INTRAOP_THREADS": str(threads),
                **(settings or {}),
            },
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ask(self, method: str, **arguments):
        """Calls a method that the script serves."""
        try:
            print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = "".join(self._errors.readlines()[-3:]).strip()
            raise Failed(f"the process ended with status {self._process.wait()} during '{method}': {last}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["result"]

    def cpu_seconds(self) -> float:
        """The processor time of the running process."""
        if self._process.poll() is not None:
            return 0.0  # os.times() includes it then
        fields = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def _python(environment: str) -> pathlib.Path:
    """The interpreter of an environment, or this one if it has the package that the environment is for."""
    here = pathlib.Path(sys.executable)
    python = ENVIRONMENTS / environment / "bin" / "python" if environment else here
    if python.exists():
        return python
    if importlib.util.find_spec(environment):
        return here
    raise Failed(f"no {python}; set it up with: benchmarks/environments.sh {environment}")


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks; `output` is the default file of the results."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=pathlib.Path, default=HERE / output)
    return parser


def write_json(path: pathlib.Path, document) -> None:
    """Writes a document, in place of the one before, as a whole or not at all."""
    written = path.with_name(path.name + ".part")
    written.write_text(json.dumps(document, indent=1) + "\n")
    written.replace(path)


def comma_separated(known):
    """A type for argparse: a comma-separated list of known names."""

    def split(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {unknown}; known: {', '.join(known)}")
        return chosen

    return split


def serve(methods: dict):
    """Answers the calls of a `Worker` until it closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"result": methods[method](**arguments)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": in_one_line(error)}
        print(json.dumps(answer), file=answers)


def in_one_line(error: Exception) -> str:
    """What an error says, without the trace that TensorFlow puts ahead and Keras' highlighting."""
    kind = type(error).__name__
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition(f"{kind}: ")[2]
    return f"{kind}: {textwrap.shorten(said, 400)}"


def installed(distributions) -> dict[str, str]:
    """The versions of the installed packages."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Another name of an installed package, such as tensorflow and tensorflow-cpu.
    return found


def time_calls(run, seconds: float, wait=None) -> list[float]:
    """Milliseconds of single calls during `seconds`; if there are several, the first is dropped.

    With `wait`, calls only queue work on a GPU, and `wait` returns when it is done. Calls are then timed in
    batches, and the first batch is dropped.
    """
    if wait:
        return _time_batches(run, seconds, wait)
    times = []
    elapsed = _time(run)
    if elapsed >= seconds:
        times.append(elapsed)
    while sum(times) < seconds:
        times.append(_time(run))
    return [1e3 * t for t in times]


def _time_batches(run, seconds: float, wait) -> list[float]:
    batches, calls, most = 5, 1, 1 << 16
    time_batch = functools.partial(_time_batch, wait=wait)
    if "torch" in sys.modules:
        # CUDA's clock is exact: batches may be short. Long ones would outlast the GPU's sleep.
        time_batch, most = _time_cuda_batch, 32
    while time_batch(run, calls) < seconds / (2 * batches) and calls < most:
        calls *= 2
    return [1e3 * time_batch(run, calls) / calls for _ in range(batches)]


def _time_cuda_batch(run, calls: int) -> float:
    """Seconds between two of torch's CUDA events; the GPU sleeps until the calls between them are queued."""
    cuda = sys.modules["torch"].cuda
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(2_000_000 * calls)  # clock cycles: about a millisecond a call
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _time_batch(run, calls: int, wait) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return time.perf_counter() - start


def wait_for_gpu():
    """Returns when a GPU has completed all work of this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()
    elif os.environ["KERAS_BACKEND"] == "jax":  # programs run in the order in which they were started
        sys.modules["jax"].numpy.zeros(()).block_until_ready()
    else:
        sys.modules["tensorflow"].test.experimental.sync_devices()


def _time(run) -> float:
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result  # not timed
    return elapsed


def memory_rise(run) -> tuple[int, int]:
    """The rise and the peak of the memory of this process during `run`, in bytes. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    result = run()
    peak = _resident("VmHWM")
    del result
    return peak - before, peak


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def interleave(workers: list[Worker], repetitions: int, seconds: float = 0.05) -> tuple[dict, dict]:
    """Times all workers alternately, so that other load on the machine affects all of them.

    Each repetition is the median of calls over `seconds`, or one longer call.

    Returns:
        The median, lowest and highest repetition in milliseconds by name, and the reasons of failures.
    """
    times = {worker.name: [] for worker in workers}
    failures = {}
    order = collections.deque(workers)
    for _ in range(repetitions):
        for worker in tuple(order):
            time.sleep(0.05)  # lets the idle threads of the previous worker go to sleep
            try:
                times[worker.name].append(statistics.median(worker.ask("sample", seconds=seconds)))
            except Failed as failure:
                failures[worker.name] = str(failure)
                order.remove(worker)
        order.rotate(-1)
    return {name: summarize(values) for name, values in times.items() if name not in failures}, failures


def summarize(milliseconds: list[float]) -> dict:
    return {
        "milliseconds": statistics.median(milliseconds),
        "lowest": min(milliseconds),
        "highest": max(milliseconds),
        "repetitions": len(milliseconds),
    }


class OtherLoad:
    """The number of cores used by other processes during the measurement."""

    def __init__(self, workers: list[Worker]):
        self._workers = workers
        self._start = self._now()

    def cores(self) -> float:
        (busy, ours, then), (busy_before, ours_before, before) = self._now(), self._start
        return max(0.0, round((busy - busy_before - ours + ours_before) / (then - before), 2))

    def _now(self):
        fields = [int(f) for f in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _waiting, interrupts, soft, stolen = fields
        busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        ours = sum(own[:4]) + sum(worker.cpu_seconds() for worker in self._workers)
        return busy, ours, time.monotonic()
