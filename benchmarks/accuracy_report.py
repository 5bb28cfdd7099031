"""Turns accuracy.py's record into tables and a plot: accuracy, what it costs, and what the gates do."""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

import report

HERE = pathlib.Path(__file__).parent
Line = dict[str, Any]


def write(record: Sequence[Line], experiments: Mapping[str, Any]) -> None:
    """Writes the tables into RESULTS.md, between its markers, and `accuracy.png` beside it."""
    report.write(HERE / "RESULTS.md", "accuracy", lines_of(record, experiments))
    draw([line for line in record if line["experiment"] == "cifar10"], HERE / "accuracy.png")


def lines_of(record: Sequence[Line], experiments: Mapping[str, Any]) -> list[str]:
    """Markdown of all experiments that have results."""
    lines: list[str] = []
    for name, experiment in experiments.items():
        variants = [variant for variant in experiment.variants if _runs(record, name, variant)]
        if variants:
            lines += ["", f"### {experiment.title}", "", *_costs(record, name, variants, experiment.base)]
    gates = [line for line in record if line["gates"]]
    if gates:
        lines += ["", "### What the gates do after training, on 256 test images", "", *_gates(gates)]
    return lines


def compare(runs: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Mean of the differences of runs with the same seed, and the ends of its 95 % confidence interval.

    By Student's t; `None` with fewer than two seeds in common.
    """
    differences = [runs[seed] - base[seed] for seed in sorted(runs.keys() & base.keys())]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = stats.t.ppf(0.975, len(differences) - 1) * error
    return mean, mean - reach, mean + reach


def _runs(record: Sequence[Line], experiment: str, variant: str) -> dict[int, Line]:
    found = (line for line in record if (line["experiment"], line["variant"]) == (experiment, variant))
    return {line["seed"]: line for line in found}


def _scores(runs: Mapping[int, Line], name: str = "test_accuracy") -> dict[int, float]:
    """Per cent, by seed."""
    return {seed: 100 * line[name] for seed, line in runs.items() if name in line}


def _costs(record: Sequence[Line], name: str, variants: Sequence[str], base: str) -> list[str]:
    against = _scores(_runs(record, *base.split("/")))
    rows = []
    for variant in variants:
        runs = _runs(record, name, variant)
        scores = _scores(runs)
        before = _scores(runs, "test_accuracy_before").values()
        line = next(iter(runs.values()))
        steps = [1e3 * run["seconds_per_step"] for run in runs.values() if run["seconds_per_step"]]
        rows.append(
            [
                variant,
                *([f"{statistics.mean(before):.1f}"] if before else []),
                _spread(list(scores.values())),
                ", ".join(f"{scores[seed]:.1f}" for seed in sorted(scores)),
                _difference(None if scores == against else compare(scores, against)),
                f"{line['parameters'] / 1e3:.1f}",
                f"{line['multiply_adds'] / 1e6:.1f}",
                f"{statistics.median(steps):.0f}" if steps else "-",
            ]
        )
    heading = ["attention", "test accuracy, %", "by seed", f"minus {base.split('/')[1]}, 95 % interval"]
    if len(rows[0]) > 7:
        heading.insert(1, "before the first step, %")
    return report.table([*heading, "parameters, k", "multiply-adds, M", "step, ms"], rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def _difference(found: tuple[float, float, float] | None) -> str:
    return "-" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def _gates(lines: Sequence[Line]) -> list[str]:
    keys = [
        (line["experiment"], line["variant"], number)
        for line in lines
        for number in range(len(line["gates"]))
    ]
    rows = []
    for experiment, variant, number in dict.fromkeys(keys):
        of_seeds = [line["gates"][number] for line in _runs(lines, experiment, variant).values()]

        def mean(name: str, of_seeds: Sequence[Line] = of_seeds) -> float:
            return statistics.mean(gate[name] for gate in of_seeds)

        height, width = of_seeds[0]["map"]
        rows.append(
            [
                f"{experiment}: {variant}",
                f"{of_seeds[0]['name']}, {height}x{width}",
                f"{mean('offset_rms_pixels'):.2f}",
                f"{100 * mean('taps_outside'):.0f}",
                f"{mean('mean'):.2f} ± {mean('deviation'):.2f}",
                f"{100 * mean('saturated'):.0f}",
            ]
        )
    heading = ["run", "gate", "offsets, pixels (root mean square)", "taps off the map, %"]
    return report.table([*heading, "gate's values", "within 5 % of 0 or the top, %"], rows)


def draw(lines: Sequence[Line], path: pathlib.Path) -> None:
    """Accuracy against multiply-adds: a point a run, a cross at the mean of each kind of attention."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for variant in dict.fromkeys(line["variant"] for line in lines):
        runs = _runs(lines, "cifar10", variant).values()
        cost = [run["multiply_adds"] / 1e6 for run in runs]
        scores = [100 * run["test_accuracy"] for run in runs]
        points = axes.scatter(cost, scores, s=18, alpha=0.6)
        axes.scatter(
            cost[0],
            statistics.mean(scores),
            s=120,
            marker="+",
            color=points.get_facecolor()[:, :3],
            label=variant,
        )
    axes.set(xlabel="multiply-adds of one image, millions", ylabel="test accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=120)
