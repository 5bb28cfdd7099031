"""Tests of the GPU report: time budget, resuming after an interruption, and a dry run on the CPU."""

import json
import os
import pathlib
import subprocess
import sys

import gpu_plan
import gpu_report
import gpu_runner
import pytest

FOLDER = pathlib.Path(gpu_report.__file__).parent


class Machine:
    """A fake machine that runs checks with given durations and has a fake clock."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.started = seconds, 0.0, []

    def clock(self):
        return self.now

    def start(self, check, limit):
        self.started.append((check.name, limit))
        took = self.seconds[check.name]
        self.now += min(took, limit)
        return {"status": "passed" if took <= limit else "timed out"}


def test_budget_and_resumption(tmp_path):
    """Unused time is passed to the next phase, and passed checks are not repeated.

    A hanging check uses up only its own time.
    """
    checks = [
        *(gpu_runner.Check("right", name, (), 10) for name in ("quick", "hangs", "late")),
        gpu_runner.Check("fast", "peer", (), 10, needs=("no_such_module",)),
        gpu_runner.Check("fast", "long", (), 40),
    ]
    ends = gpu_report.phase_ends("gpu", ["right", "fast"], 0.0, 90.0)
    assert ends == {"right": 45.0, "fast": 90.0}
    path, about = tmp_path / "report.jsonl", {"gpu": "a fine GPU"}
    machine = Machine(quick=8, hangs=1e9, late=10, long=45)
    gpu_runner.run(checks, gpu_runner.Journal(path, about), ends, machine.start, machine.clock)
    assert machine.started == [("quick", 30), ("hangs", 30), ("long", 52)]

    with path.open("a") as file:
        file.write('{"check": "right-la')  # interrupted by a power failure
    journal = gpu_runner.Journal(path, about)
    found = {outcome["name"]: outcome["status"] for outcome in gpu_runner.summarize(checks, journal)}
    statuses = {"quick": "passed", "hangs": "timed out", "late": "not run", "peer": "absent"}
    assert found == {**statuses, "long": "passed"}
    assert "no_such_module" in journal.outcomes["fast-peer"]["reason"]

    machine = Machine(hangs=5, late=10)
    gpu_runner.run(checks, journal, ends, machine.start, machine.clock)
    assert machine.started == [("hangs", 30), ("late", 30)]
    assert gpu_runner.Journal(path, about).outcomes == journal.outcomes
    assert not gpu_runner.Journal(path, {"gpu": "another"}).outcomes
    assert path.with_name("report.jsonl.old").exists()


def test_checks_share_a_cache_of_bytecode(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    gpu_report.prepare_environment("cpu")
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ


@pytest.mark.slow
def test_a_crash_and_a_hang_are_outcomes(tmp_path):
    write = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"cells\": []}'); "

    def outcome_of(name, code, limit):
        check = gpu_runner.Check("right", name, ("-c", write + code), 1)
        return gpu_runner.start_process(check, limit, tmp_path)

    assert outcome_of("good", "", 60) == {"status": "passed", "result": {"cells": []}}
    crash = outcome_of("crash", "print('the last words', flush=True); os.abort()", 60)
    assert (crash["status"], crash["reason"]) == ("failed", "exit status -6")
    assert "the last words" in crash["last_lines"]
    hang = outcome_of("hang", "import signal; print('waits', flush=True); signal.pause()", 5)
    assert (hang["status"], hang["last_lines"]) == ("timed out", ["waits"])
    assert hang["result"] == {"cells": []}


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Runs all phases and checks that the report is complete. The budget suffices for a busy machine."""
    command = [sys.executable, str(FOLDER / "gpu_report.py"), "--device", "cpu", "--budget", "3600"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "report.json").read_text())
    found = {outcome["check"]: outcome for outcome in report["outcomes"]}
    assert list(found) == [check.key for check in gpu_plan.checks("cpu", None)]
    bad = [outcome for outcome in found.values() if outcome["status"] not in ("passed", "absent")]
    assert not bad
    assert done.returncode == 0
    ours = [check.key for check in gpu_plan.checks("cpu", None) if not check.peer]
    assert all(found[key]["status"] == "passed" for key in ours)
    for key in ours:
        if key.startswith("fast-"):
            cells = found[key]["result"]["cells"]
            assert cells
            assert all(cell["milliseconds"] > 0 for cell in cells)
    assert [line["variant"] for line in found["worth-training"]["result"]["lines"]] == ["none", "DAS"]
    for heading in ("Targets", "depthwise, forward and backward", "Images of noise"):
        assert f"### {heading}" in done.stdout
