"""Runs Python code in subprocesses without the time to import TensorFlow.

A server process imports TensorFlow once and runs nothing else. Each subprocess is a fork of the server. Do
not use this module for tests of import side effects, or of environment variables that TensorFlow reads on
import.
"""

import faulthandler
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from multiprocessing.context import ForkServerContext
from pathlib import Path

_SECONDS = 300


def python(
    code: str, *words: object, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Runs code like `python -c`, with `words` as arguments and additional environment variables.

    Raises subprocess.TimeoutExpired after killing the process, since a test may expect a killed process.
    """
    code, command = textwrap.dedent(code), ["-c", *map(str, words)]
    with tempfile.TemporaryDirectory() as printed:
        files = [Path(printed) / name for name in ("stdout", "stderr")]
        arguments = (code, command, folder or Path.cwd(), {**os.environ, **environment}, files)
        process = _forks().Process(target=_run, args=arguments)
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, _SECONDS)
        output, errors = (file.read_text() for file in files)
    return subprocess.CompletedProcess(command, process.exitcode, output, errors)


@functools.cache
def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "keras"])
    return context


def _run(code: str, command: list[str], folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    faulthandler.enable()  # crashes print a traceback
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
