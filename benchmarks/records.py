"""Records of repeatable runs: one JSON line for each finished run, in a process with one thread."""

import json
import os
import pathlib
from typing import Any


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a record so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: pathlib.Path, line: dict[str, Any]) -> None:
    """Adds the line of a finished run to a record."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def environment() -> dict[str, str]:
    """The environment of a run, with one thread: reruns on the same kind of machine give the same figures."""
    threads = {f"TF_NUM_{kind}_THREADS": "1" for kind in ("INTRAOP", "INTEROP")}
    # TensorFlow enables oneDNN by default only on some processors. It is a third faster on the others.
    return {**os.environ, **threads, "OMP_NUM_THREADS": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}
