"""Converts the results of gpu_report.py to tables."""

from collections.abc import Iterator
from typing import Any

import report
from problem import MODES

Document = dict[str, Any]
_OURS = "native-xla-loop"


def lines(document: Document) -> list[str]:
    """Markdown of a report."""
    about = document["machine"]
    found = [
        f"{document['date']}, `{document['command']}`.",
        f"{about['gpu'] or 'No GPU'}; {about['processor']}, {about['cores']} cores, {about['system']}, "
        f"Python {about['python']}.",
        "",
        "### Checks",
        "",
        *_outcomes(document["outcomes"]),
    ]
    if operations := merge_operations(document["outcomes"]):
        found += ["", "### Targets", "", *targets(document, operations)]
    for merged in operations:
        found += ["", *report.op_lines(merged)]
    for mode in ("training", "inference"):
        if model := _result(document, f"fast-model-{mode}"):
            found += ["", *report.model_lines(model)]
    return found + _worth(document)


def _outcomes(outcomes: list[Document]) -> list[str]:
    rows = []
    for outcome in outcomes:
        said = outcome.get("reason", "")
        if outcome["phase"] == "right" and "result" in outcome:
            said = "; ".join(f"{name}: {value}" for name, value in outcome["result"].items())
        rows.append(
            [outcome["phase"], outcome["name"], outcome["status"], f"{outcome.get('seconds', 0):.0f}", said]
        )
    table = report.table(["phase", "check", "outcome", "seconds", "details"], rows)
    for outcome in outcomes:
        if last := outcome.get("last_lines"):
            table += ["", f"Last output of {outcome['check']}:", "", *(f"    {line}" for line in last)]
    return table


def _result(document: Document, check: str) -> Any:
    outcomes = {outcome["check"]: outcome for outcome in document["outcomes"]}
    return outcomes.get(check, {}).get("result")


def merge_operations(outcomes: list[Document]) -> list[Document]:
    """Merges the documents of bench_op.py: one document for each dtype, with all contenders."""
    merged: dict[str, Document] = {}
    for outcome in outcomes:
        found = outcome.get("result")
        if not found or not isinstance(found, dict) or found.get("benchmark") != "op":
            continue
        of_dtype = merged.setdefault(found["dtype"], {**found, "cells": [], "missing": {}, "versions": {}})
        of_dtype["cells"] += found["cells"]
        of_dtype["missing"] |= found["missing"]
        of_dtype["versions"] |= found["versions"]
        if isinstance(of_dtype["rates"], str):
            of_dtype["rates"] = found["rates"]
    for of_dtype in merged.values():
        of_dtype["command"] = "benchmarks/bench_op.py"
        of_dtype["cells"].sort(key=lambda cell: (cell["op"], cell["mode"], -_side(cell)))
    return list(merged.values())


def _side(cell: Document) -> int:
    return int(cell["shape"].split("x")[1])


def targets(document: Document, operations: list[Document]) -> list[str]:
    """The targets on a GPU, with the ratios that were measured at the worst shape."""
    rows = []
    float32 = next((found for found in operations if found["dtype"] == "float32"), operations[0])
    for operation, peer, wanted in (
        ("depthwise", "torchvision", "at least 5"),
        ("depthwise", "deformops", "at least 1"),
        ("dense", "torchvision", "at least 0.9"),
        ("dense", "deformops", "at least 0.9"),
    ):
        for mode in MODES:
            ratios = list(_ratios(float32["cells"], operation, mode, peer))
            what = f"{operation}, {report.TITLES[mode]}: speed relative to {peer}"
            rows.append([what, wanted, f"{min(ratios):.2f}" if ratios else "-"])
    rows.append(
        ["share of the copy bandwidth, depthwise, forward, largest shape", "at least 50 %", _share(float32)]
    )
    rows.append(["overhead of an eager call at the smallest shape, ms", "under 0.15", _overhead(float32)])
    rows.append(["training step with four gates relative to none", "at most 1.2", _step(document)])
    return report.table(["", "target", "measured"], rows)


def _times(cells: list[Document], operation: str, mode: str, contender: str) -> dict[str, float]:
    return {
        cell["shape"]: cell["milliseconds"]
        for cell in cells
        if (cell["op"], cell["mode"], cell["contender"]) == (operation, mode, contender)
        and "milliseconds" in cell
    }


def _ratios(cells: list[Document], operation: str, mode: str, peer: str) -> Iterator[float]:
    ours, theirs = (_times(cells, operation, mode, name) for name in (_OURS, peer))
    return (theirs[shape] / ours[shape] for shape in ours.keys() & theirs.keys())


def _share(found: Document) -> str:
    times = _times(found["cells"], "depthwise", "forward", _OURS)
    if not times:
        return "-"
    shape, took = next(iter(times.items()))
    least = report.floor(report.Problem("depthwise", shape, found["dtype"]), "forward", found["rates"])
    return f"{least / took:.0%}" if least else "-"


def _overhead(found: Document) -> str:
    eager, loop = (_times(found["cells"], "depthwise", "forward", name) for name in ("native-eager", _OURS))
    common = [shape for shape in loop if shape in eager]
    return f"{eager[common[-1]] - loop[common[-1]]:.3f}" if common else "-"


def _step(document: Document) -> str:
    model = _result(document, "fast-model-training")
    times = {
        cell["contender"]: cell["milliseconds"]
        for cell in (model or {"cells": []})["cells"]
        if cell["mode"] == "training" and "milliseconds" in cell
    }
    if {"none-xla", "native-xla"} <= times.keys():
        return f"{times['native-xla'] / times['none-xla']:.2f}"
    return "-"


def _worth(document: Document) -> list[str]:
    found = _result(document, "worth-training")
    if not found:
        return []
    import accuracy_report  # requires SciPy

    return accuracy_report.lines_of(found["lines"], {found["task"]: found["title"]})
