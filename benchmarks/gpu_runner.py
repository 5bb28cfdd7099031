"""Runs the checks of gpu_report.py within a time, each in a process of its own, and keeps what they found."""

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
_LAST_LINES = 8  # of what a process printed, kept if it fails


@dataclass(frozen=True)
class Check:
    """A command that writes its results as JSON to the file that is its last argument."""

    phase: str
    name: str
    arguments: tuple[str, ...]
    seconds: float  # what it is expected to take: it starts if so much is left
    needs: tuple[str, ...] = ()  # modules
    absent: str = ""  # why it cannot run here
    environment: Mapping[str, str] = field(default_factory=dict)
    peer: bool = False  # whether it is another package's
    resumes: bool = False  # whether it reads that file, which an interrupted run has left, and adds to it

    @property
    def key(self) -> str:
        """Its name in the journal and of its files."""
        return f"{self.phase}-{self.name}"


class Journal:
    """A file of JSON lines: what the report is of, then an outcome for each check that has ended."""

    def __init__(self, path: pathlib.Path, about: Mapping[str, Any]) -> None:
        """Opens the journal of an interrupted report; one about something else is set aside."""
        self.path, self.outcomes = path, {}
        found = _read(path)
        if found and found[0] == about:
            self.outcomes = {outcome["check"]: outcome for outcome in found[1:]}
            if not path.read_bytes().endswith(b"\n"):
                with path.open("a") as file:
                    file.write("\n")  # it broke off within a line
            return
        if path.exists():
            path.replace(path.with_name(path.name + ".old"))
        self._append(about)

    def add(self, outcome: Outcome) -> None:
        """Keeps an outcome for good."""
        self.outcomes[outcome["check"]] = outcome
        self._append(outcome)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines that are whole; the last may not be."""
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
    """Runs the checks that have not passed yet, in their order.

    Args:
        checks: The checks.
        journal: Where outcomes go, and where those of an interrupted report are.
        ends: For each phase, when it ends on the clock. What one leaves is the next one's.
        start: Runs a check for at most that many seconds, and returns its outcome. They are thrice what the
            check is expected to take, or half of what its phase has left.
        clock: Seconds that pass.
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
                continue  # what is known is more than that
            outcome = {"status": "not run", "reason": f"{max(left, 0):.0f} s of its phase were left"}
        else:
            print(f"{check.phase}: {check.name} ...", flush=True)
            began = clock()
            outcome = start(check, min(left, max(3 * check.seconds, left / 2)))
            outcome["seconds"] = round(clock() - began, 1)
        journal.add({"check": check.key, "phase": check.phase, "name": check.name, **outcome})
        print(f"{check.phase}: {check.name}: {outcome['status']} {outcome.get('reason', '')}", flush=True)


def _why_not(check: Check) -> str:
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    return check.absent or ("there is no module " + " and no ".join(missing) if missing else "")


def start_process(check: Check, seconds: float, folder: pathlib.Path) -> Outcome:
    """Runs a check's command; what it prints goes to a file of its name in the folder."""
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
            start_new_session=True,  # so that it can be ended with all that it has started
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
    """Looks into what a benchmark has found, which does not fail with its contenders."""
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
    """The outcome of each check, in their order."""
    return [journal.outcomes[check.key] for check in checks if check.key in journal.outcomes]
