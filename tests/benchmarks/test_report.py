"""Tests that RESULTS.md contains the results of the benchmarks."""

import json
import pathlib
import shutil

import pytest
import report

FOLDER = pathlib.Path(report.__file__).parent


@pytest.mark.parametrize("name", sorted(report.WRITERS))
def test_tables_are_those_of_the_measurements(name, tmp_path, monkeypatch):
    """Rewriting the tables does not change the file."""
    results = shutil.copy(FOLDER / "RESULTS.md", tmp_path / "RESULTS.md")
    before = results.read_text()
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", str(FOLDER / f"{name}.json")])
    report.main()
    assert results.read_text() == before


@pytest.mark.parametrize("name", ["op", "model"])
def test_those_of_a_gpu_have_a_place_of_their_own(name, tmp_path, monkeypatch):
    document = json.loads((FOLDER / f"{name}.json").read_text())
    document["device"], document["machine"]["gpu"] = "gpu", "a fine GPU"
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(document))
    results = shutil.copy(FOLDER / "RESULTS.md", tmp_path / "RESULTS.md")
    before = results.read_text()
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", str(measured)])
    report.main()
    head, rest = before.split(f"<!-- begin {name}-gpu -->")
    written = results.read_text()
    assert written.startswith(head)
    assert written.endswith(rest.split(f"<!-- end {name}-gpu -->")[1])
    assert written.count("a fine GPU") == 1
