"""Runs the examples in subprocesses, two of which can represent two machines."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .conftest import ROOT

TWO_DEVICES = """
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""

# Crashes print a traceback. oneDNN is disabled, because with it TensorFlow 2.21's gradients of small
# convolutions write out of bounds on processors with AVX-512.
SETTINGS = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "TF_ENABLE_ONEDNN_OPTS": "0"}


def begin(folder: Path, script: str, *words: str, **environment: str) -> subprocess.Popen:
    """Starts a Python script in a folder. Call `result` to wait for it."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        env={**os.environ, **SETTINGS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> dict:
    """Waits for a process and returns the last line of its output, parsed as JSON."""
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, f"{output}\n{errors}"
    return json.loads(output.splitlines()[-1])


def start_both(
    start: Callable[..., subprocess.Popen], *words: str, **of_second: str
) -> list[subprocess.Popen]:
    """Starts the same run on two machines. Only the first one writes files.

    `start` accepts command-line arguments and environment variables. The second machine receives additional
    variables.
    """
    cluster = {"worker": [f"127.0.0.1:{port}" for port in _free_ports(2)]}
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(2)]
    shared = ("--strategy", "multiworker", "--output", "both", *words)
    first = start(*shared, TF_CONFIG=json.dumps(tasks[0]))
    return [first, start(*shared, TF_CONFIG=json.dumps(tasks[1]), **of_second)]


def results_of_both(start: Callable[[], list[subprocess.Popen]]) -> dict:
    """Returns the results of the first of two machines.

    In rare cases, TensorFlow (2.21) terminates one of the processes with SIGSEGV. Only in this case, both are
    restarted once.
    """
    processes, printed = _run_both(start)
    if any(process.returncode == -signal.SIGSEGV for process in processes):
        print("A process crashed; once more. They had printed:", *map("\n".join, printed), sep="\n")
        processes, printed = _run_both(start)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(map("\n".join, printed))
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in printed)
    assert second["history"] is None
    return first


def _run_both(start: Callable[[], list[subprocess.Popen]]) -> tuple[list[subprocess.Popen], list]:
    """Waits for both processes, and returns them with the output and errors of each."""
    processes = start()
    with contextlib.ExitStack() as stack:
        for process in processes:  # if one fails, the other waits forever
            stack.enter_context(process)
            stack.callback(process.kill)
        return processes, [process.communicate(timeout=600) for process in processes]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
