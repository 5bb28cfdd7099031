"""Tests of the comparison of detectors: resuming, and the table of results."""

import json
import pathlib

import detection
import pytest


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "RECORD", tmp_path / "detection.jsonl")
    monkeypatch.setattr(detection, "RUNS", tmp_path)
    (tmp_path / "resnet18").mkdir()
    return detection.RECORD


def test_what_is_in_the_record_is_not_run_again(record, monkeypatch):
    started = []

    def train(data, preset, variant, seed):
        started.append((variant, seed))
        failed = (variant, seed) == ("DAS", 1)
        return None if failed else {"variant": variant, "seed": seed, "AP": 0.25, "AP50": 0.5}

    monkeypatch.setattr(detection, "_train", train)
    arguments = (pathlib.Path("data"), pathlib.Path("weights"), [0, 1], ["none", "DAS"])
    assert detection.run(*arguments) == 1
    assert started == [("none", 0), ("DAS", 0), ("none", 1), ("DAS", 1)]
    started.clear()
    assert detection.run(*arguments) == 1
    assert started == [("DAS", 1)]


def test_table():
    figures = {("none", 0): 0.2, ("none", 1): 0.3, ("DAS", 0): 0.3, ("DAS", 1): 0.4}
    record = [{"variant": v, "seed": s, "AP": ap, "AP50": 2 * ap} for (v, s), ap in figures.items()]
    text = "\n".join(detection.lines_of(json.loads(json.dumps(record))))
    assert "| AP | DAS | 35.0 | 30.0, 40.0 | +10.0 (+10.0 to +10.0) |" in text
    assert "| AP50 | none | 50.0 | 40.0, 60.0 | - |" in text
