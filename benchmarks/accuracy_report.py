"""Converts the record of accuracy.py to tables: accuracy, cost, and statistics of the gates."""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

import report

HERE = pathlib.Path(__file__).parent
Line = dict[str, Any]
_ADDED = "the same layers, added"
_BASES = ("none", "SE", _ADDED)
_ADDED_TO = {"DAS, dense": f"{_ADDED}, dense", "DAS, dense, offsets frozen at 0": f"{_ADDED}, dense"}
_PAIRS = {  # of one form of the gate, with learned offsets and without
    "DAS": "DAS, offsets frozen at 0",
    "DAS, dilation 1, offset scale 1": "DAS, dilation 1, offsets frozen at 0",
    "DAS, dense": "DAS, dense, offsets frozen at 0",
}


def write(record: Sequence[Line], titles: Mapping[str, str]) -> None:
    """Writes the tables between the markers of RESULTS.md; `titles` contains a title for each task."""
    report.write(HERE / "RESULTS.md", "accuracy", lines_of(record, titles))


def lines_of(record: Sequence[Line], titles: Mapping[str, str]) -> list[str]:
    """Markdown of all tasks that have results."""
    lines: list[str] = []
    for task, title in titles.items():
        of_task = [line for line in record if line["task"] == task]
        if of_task:
            machines = sorted({line["machine"] for line in of_task})
            lines += ["", f"### {title}", "", f"Run on {'; '.join(machines)}.", "", *_accuracy(of_task)]
            if any(line["gates"] for line in of_task):
                lines += ["", *_gates(of_task)]
    return lines


def compare(runs: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float, float] | None:
    """The mean difference of runs with the same seed, and its 95 % confidence interval.

    Uses Student's t; `None` with fewer than two seeds in common.
    """
    differences = [runs[seed] - base[seed] for seed in sorted(runs.keys() & base.keys())]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = stats.t.ppf(0.975, len(differences) - 1) * error
    return mean, mean - reach, mean + reach


def _by_variant(lines: Sequence[Line]) -> dict[str, dict[int, Line]]:
    found: dict[str, dict[int, Line]] = {}
    for line in lines:
        found.setdefault(line["variant"], {})[line["seed"]] = line
    return found


def _accuracy(lines: Sequence[Line]) -> list[str]:
    variants = _by_variant(lines)
    scores = {
        variant: {seed: 100 * line["test_accuracy"] for seed, line in runs.items()}
        for variant, runs in variants.items()
    }
    with_boxes = any("cam_auc" in line for line in lines)
    rows = []
    for variant, runs in variants.items():
        line = next(iter(runs.values()))
        rows.append(
            [
                variant,
                _spread(list(scores[variant].values())),
                ", ".join(f"{scores[variant][seed]:.1f}" for seed in sorted(runs)),
                *(_difference(scores, variant, base) for base in _BASES),
                f"{line['parameters'] / 1e3:.0f}",
                f"{line['multiply_adds'] / 1e6:.1f}",
                f"{1e3 * statistics.median(run['seconds_per_step'] for run in runs.values()):.0f}",
                *([f"{statistics.mean(run['cam_auc'] for run in runs.values()):.2f}"] if with_boxes else []),
            ]
        )
    heading = ["attention", "test accuracy, %", "by seed"]
    heading += [f"minus {base}, 95 % interval" for base in _BASES]
    heading += ["parameters, k", "multiply-adds, M", "step, ms"]
    table = report.table([*heading, *(["Grad-CAM, area under ROC"] if with_boxes else [])], rows)
    return table + _learned_minus_frozen(scores)


def _learned_minus_frozen(scores: Mapping[str, Mapping[int, float]]) -> list[str]:
    """A line for each form of the gate that was trained with learned offsets and without."""
    found = {
        learned: _difference(scores, learned, frozen)
        for learned, frozen in _PAIRS.items()
        if learned in scores and frozen in scores
    }
    lines = [f"- {learned}: {text}" for learned, text in found.items() if text != "-"]
    return ["", "Learned offsets minus frozen ones, 95 % interval:", "", *lines] if lines else []


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def _difference(scores: Mapping[str, Mapping[int, float]], variant: str, base: str) -> str:
    if base == _ADDED:
        base = _ADDED_TO.get(variant, base)
    if variant == base or base not in scores:
        return "-"
    found = compare(scores[variant], scores[base])
    return "-" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def _gates(lines: Sequence[Line]) -> list[str]:
    rows = []
    with_boxes = any("auc" in gate for line in lines for gate in line["gates"])
    for variant, runs in _by_variant(lines).items():
        for of_seeds in zip(*(line["gates"] for line in runs.values()), strict=True):
            rows.append([variant, *_describe(of_seeds, with_boxes)])
    heading = ["attention", "gate", "offsets, pixels (root mean square)", "values", "spatial deviation"]
    return report.table([*heading, *(["area under ROC"] if with_boxes else [])], rows)


def _describe(of_seeds: Sequence[Line], with_boxes: bool) -> list[str]:
    """The table cells of a gate: means over the seeds."""

    def mean(name: str) -> float:
        return statistics.mean(gate[name] for gate in of_seeds)

    height, width = of_seeds[0]["map"]
    cells = [f"{of_seeds[0]['name']}, {height}x{width}", f"{mean('offset_rms_pixels'):.2f}"]
    cells += [f"{mean('mean'):.2f} ± {mean('deviation'):.2f}", f"{mean('spatial_deviation'):.3f}"]
    return [*cells, *([f"{mean('auc'):.2f}"] if with_boxes else [])]
