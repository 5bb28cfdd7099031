"""Runs the checks of gpu_report.py in separate processes within a time limit, and records their outcomes."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Outcome = dict[str, Any]
_LAST_LINES = 8  # lines of output kept for a failed check


@dataclass(frozen=True)
class Check:
    """A command that writes its results as JSON to the file named by its last argument."""

    phase: str
    name: str
    arguments: tuple[str, ...]
    seconds: float  # expected duration: the check starts only if this much time is left
    needs: tuple[str, ...] = ()  # required modules
    absent: str = ""  # the reason why it cannot run, if any
    environment: Mapping[str, str] = field(default_factory=dict)
    peer: bool = False  # whether it measures another package
    resumes: bool = False  # whether it continues the result file of an interrupted run

    @property
    def key(self) -> str:
        """The name in the journal and of the check's files."""
        return f"{self.phase}-{self.name}"


class Journal:
    """A file of JSON lines: the subject of the report, then the outcome of each finished check."""

    def __init__(self, path: pathlib.Path, about: Mapping[str, Any]) -> None:
        """Opens the journal of an interrupted report. A journal with another subject is renamed."""
        self.path, self.outcomes = path, {}
        found = _read(path)
        if found and found[0] == about:
            self.outcomes = {outcome["check"]: outcome for outcome in found[1:]}
            if not path.read_bytes().endswith(b"\n"):
                with path.open("a") as file:
                    file.write("\n")  # the last line is incomplete
            return
        if path.exists():
            path.replace(path.with_name(path.name + ".old"))
        self._append(about)

    def add(self, outcome: Outcome) -> None:
        """Records an outcome durably."""
        self.outcomes[outcome["check"]] = outcome
        self._append(outcome)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines. An interruption can leave the last one incomplete."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def run(
    checks: Iterable[Check],
    journal: Journal,
    ends: Mapping[str, float],
    start: Callable[[Check, float], Outcome],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs the checks that have not passed yet, in order.

    Args:
        checks: The checks.
        journal: The journal, with the outcomes of an interrupted report.
        ends: The end of each phase on the clock.
        start: Runs a check for at most the given number of seconds, and returns its outcome. The limit is
            three times the expected duration or half of the time left in the phase, whichever is longer.
        clock: Returns the time in seconds.
    """
    for check in checks:
        before = journal.outcomes.get(check.key, {})
        if before.get("status") == "passed":
            continue
        left = ends[check.phase] - clock()
        if reason := _why_not(check):
            outcome = {"status": "absent", "reason": reason}
        elif left < check.seconds:
            if before:
                continue  # the earlier outcome is more informative
            outcome = {"status": "not run", "reason": f"its phase had {max(left, 0):.0f} s left"}
        else:
            print(f"{check.phase}: {check.name} ...", flush=True)
            began = clock()
            outcome = start(check, min(left, max(3 * check.seconds, left / 2)))
            outcome["seconds"] = round(clock() - began, 1)
        journal.add({"check": check.key, "phase": check.phase, "name": check.name, **outcome})
        print(f"{check.phase}: {check.name}: {outcome['status']} {outcome.get('reason', '')}", flush=True)


def _why_not(check: Check) -> str:
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    return check.absent or ("not installed: " + ", ".join(missing) if missing else "")


def start_process(check: Check, seconds: float, folder: pathlib.Path) -> Outcome:
    """Runs the command of a check. The folder receives its output and its results."""
    result, log = (folder / f"{check.key}.{ending}" for ending in ("json", "log"))
    if not check.resumes:
        result.unlink(missing_ok=True)
    command = [sys.executable, *check.arguments, str(result)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **check.environment},
            start_new_session=True,  # to be terminated with its children
        )
        try:
            status = process.wait(seconds)
            outcome = {"status": "passed"} if status == 0 else _failed(log, f"exit status {status}")
        except subprocess.TimeoutExpired:
            outcome = {**_failed(log, f"not done after {seconds:.0f} s"), "status": "timed out"}
        finally:
            _end(process)
    if result.exists():
        outcome["result"] = json.loads(result.read_text())
    return judge(check, outcome)


def judge(check: Check, outcome: Outcome) -> Outcome:
    """Derives the status from the results: a benchmark succeeds even if a contender fails."""
    found = outcome.get("result", {})
    failures = [cell["failed"] for cell in found.get("cells", ()) if "failed" in cell]
    missing = list(found.get("missing", {}).values())
    if outcome["status"] != "passed" or not failures + missing:
        return outcome
    status = "absent" if check.peer and not failures else "failed"
    return {**outcome, "status": status, "reason": (failures + missing)[0]}


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failed(log: pathlib.Path, reason: str) -> Outcome:
    lines = log.read_text(errors="replace").splitlines()
    return {"status": "failed", "reason": reason, "last_lines": lines[-_LAST_LINES:]}


def summarize(checks: Sequence[Check], journal: Journal) -> list[Outcome]:
    """The outcomes of the checks, in order."""
    return [journal.outcomes[check.key] for check in checks if check.key in journal.outcomes]
