"""Converts the results of the benchmarks to tables.

python benchmarks/report.py [op.json] [model.json] [export.json]  # writes them between RESULTS.md's markers
python benchmarks/report.py runs/gpu/report.json                  # the report of gpu_report.py
"""

import itertools
import json
import pathlib
import statistics
import sys

from contenders import CONTENDERS
from problem import Problem

HERE = pathlib.Path(__file__).parent
TITLES = {"forward": "forward", "forward_backward": "forward and backward"}


def print_op(document):
    print("\n" + "\n".join(op_lines(document)))


def print_model(document):
    print("\n" + "\n".join(model_lines(document)))


def op_lines(document) -> list[str]:
    """Markdown of the results of bench_op.py."""
    lines = [*_setting(document), *_rates(document)]
    dtype = document.get("dtype", "float32")
    groups = itertools.groupby(document["cells"], key=lambda cell: (cell["op"], cell["mode"]))
    for (operation, mode), cells in groups:
        cells = list(cells)
        for batch in dict.fromkeys(_batch(cell) for cell in cells):
            of_batch = [cell for cell in cells if _batch(cell) == batch]
            half = "" if dtype == "float32" else f", {dtype}"
            lines += ["", f"### {operation}, {TITLES[mode]}, batch {batch}{half}", ""]
            problems = {cell["shape"]: Problem(operation, cell["shape"], dtype) for cell in of_batch}
            lines += _times(of_batch, problems, mode, document["rates"])
    lines += _memory(document["memory"])
    return lines


def model_lines(document) -> list[str]:
    """Markdown of the results of bench_model.py."""
    lines = _setting(document)
    for mode, by_name in _by_mode(document["cells"]):
        rows = []
        for cell in by_name.values():
            took, _, ratio = _beside(cell, by_name.get(cell["base"], {}))
            rows.append(
                [cell["description"], _number(took), _number(ratio, "x"), _mebibytes(cell.get("memory"))]
            )
        heading = ["", "ms", "relative to no gates", "peak resident memory, MiB"]
        lines += ["", f"### {mode}", "", *table(heading, rows), *_failures(by_name.values())]
    return lines


def export_lines(document) -> list[str]:
    """Markdown of the results of bench_export.py."""
    lines = _setting(document)
    for mode, by_name in _by_mode(document["cells"]):
        rows = []
        for cell in by_name.values():
            if cell["gates"] != "gated":
                continue
            took, without, ratio = _beside(cell, by_name.get(f"plain-{cell['form']}", {}))
            error = f"{cell['error']:.1e}" if "error" in cell else "-"
            size = _mebibytes(cell.get("bytes"))
            rows.append(
                [cell["description"], error, _number(took), _number(without), _number(ratio, "x"), size]
            )
        heading = ["", "deviation", "ms", "ms without gates", "relative", "size, MiB"]
        lines += ["", f"### {mode}", "", *table(heading, rows), *_failures(by_name.values())]
    return lines


def _by_mode(cells):
    """Each mode with its cells by contender."""
    for mode, of_mode in itertools.groupby(cells, key=lambda cell: cell["mode"]):
        yield mode, {cell["contender"]: cell for cell in of_mode}


def _beside(cell, base) -> tuple[float | None, float | None, float | None]:
    """Milliseconds of two cells and their ratio, or `None` if not measured."""
    took, without = cell.get("milliseconds"), base.get("milliseconds")
    return took, without, took / without if took and without else None


def _times(cells, problems, mode, rates) -> list[str]:
    """One row per contender, sorted by total time, then the floor.

    On a GPU, beside each time, the floor's share of it: how much of the copy bandwidth was used.
    """
    shapes = list(problems)
    times = {}
    for cell in cells:
        if "milliseconds" in cell:
            times.setdefault(cell["contender"], {})[cell["shape"]] = cell["milliseconds"]
    sums = {name: sum(by_shape.values()) for name, by_shape in times.items() if len(by_shape) == len(shapes)}
    peers = {name: total for name, total in sums.items() if not CONTENDERS[name].native}
    fastest = min(peers, key=peers.get, default=None)
    floors = {shape: floor(problem, mode, rates) for shape, problem in problems.items()}
    of_bandwidth = not isinstance(rates, str) and "multiply_adds_per_second" not in rates
    least = None if None in floors.values() else sum(floors.values())

    rows = []
    for name in sorted(times, key=lambda name: sums.get(name, float("inf"))):
        total = sums.get(name)
        row = [_emphasize(name)]
        for shape in shapes:
            took = times[name].get(shape)
            share = f" ({floors[shape] / took:.0%})" if took and of_bandwidth else ""
            row.append(_number(took) + share)
        row.append(_number(total))
        row.append(_number(peers[fastest] / total if fastest and total else None, "x"))
        row.append(_number(total / least if least and total else None, "x"))
        rows.append(row)
    rows.append(["floor", *(_number(floors[shape]) for shape in shapes), _number(least), "", ""])
    heading = [
        "ms",
        *shapes,
        "sum",
        f"speed relative to {fastest or 'the fastest peer'}",
        "relative to the floor",
    ]
    return [*table(heading, rows), *_failures(cells)]


def floor(problem: Problem, mode: str, rates) -> float | None:
    """The lower bound of the time on this machine in milliseconds, or `None` if unknown."""
    if isinstance(rates, str):
        return None
    return 1e3 * max(
        problem.least_bytes(mode) / rates["copy_bytes_per_second"],
        problem.multiply_adds(mode)
        / rates.get("multiply_adds_per_second", float("inf")),  # not measured on GPUs
    )


def _memory(rows) -> list[str]:
    if not rows:
        return []
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {}
    for row in rows:
        found.setdefault((row["contender"], row["op"], row["mode"]), {})[row["shape"]] = row.get("bytes")
    rows_of = [
        [_emphasize(name), operation, TITLES[mode], *(_mebibytes(by_shape.get(shape)) for shape in shapes)]
        for (name, operation, mode), by_shape in found.items()
    ]
    lines = ["", "### Peak memory beyond arguments and results", ""]
    return [*lines, *table(["MiB", "", "", *shapes], rows_of), *_failures(rows)]


def _setting(document) -> list[str]:
    about = document["machine"]
    versions = {}
    for found in document["versions"].values():
        for package, version in found.items():
            versions.setdefault(package, set()).add(version)
    listed = ", ".join(f"{package} {' and '.join(sorted(v))}" for package, v in sorted(versions.items()))
    gpu = f"{about['gpu']}; " if document.get("device") == "gpu" else ""
    loads = [cell["other_load"] for cell in document["cells"]] or [0.0]
    lines = [
        f"{document['date']}, `{document['command']}`, {document['threads']} threads.",
        f"{gpu}{about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, {about['system']}, "
        f"Python {about['python']}; {listed}.",
        f"Load of other processes: {statistics.median(loads):.2f} cores (at most {max(loads):.2f}).",
    ]
    return lines + [f"Without {name}: {reason}" for name, reason in document["missing"].items()]


def _rates(document) -> list[str]:
    rates = document["rates"]
    if isinstance(rates, str):
        return [f"The floor is unknown: {rates}."]
    if "multiply_adds_per_second" not in rates:
        return [
            f"Measured copy bandwidth of the GPU (read and write): "
            f"{rates['copy_bytes_per_second'] / 1e9:.0f} GB/s."
        ]
    return [
        f"Measured rates: {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s copied, "
        f"{rates['multiply_adds_per_second'] / 1e9:.1f} G float32 multiply-adds per second."
    ]


def _failures(cells) -> list[str]:
    failed = [(c["contender"], c.get("shape", c["mode"]), c["failed"]) for c in cells if "failed" in c]
    lines = [f"{name}, {where}, failed: {why}" for name, where, why in sorted(failed)]
    return [line for failure in lines for line in ("", failure)]


def table(heading, rows) -> list[str]:
    rules = ["---", *["--:"] * (len(heading) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in (heading, rules, *rows)]


def _number(value, unit: str = "") -> str:
    if value is None:
        return "-"
    digits = next((digits for digits, least in enumerate((100, 10, 0.1)) if value >= least), 3)
    return f"{value:.{digits}f}{unit}"


def _mebibytes(size) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _emphasize(name: str) -> str:
    return f"**{name}**" if CONTENDERS[name].native else name


def _batch(cell) -> str:
    return cell["shape"].split("x")[0]


def write(results: pathlib.Path, name: str, lines: list[str]):
    """Replaces the text between the markers `name`."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    text = results.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{results} has no markers {begin.strip()} and {end.strip()}")
    head, tail = text.split(begin)[0], text.split(end)[1]
    results.write_text(head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail)


WRITERS = {"op": op_lines, "model": model_lines, "export": export_lines}


def _writer(document):
    if document["benchmark"] == "gpu-report":
        import gpu_tables  # which imports this module

        return gpu_tables.lines
    return WRITERS[document["benchmark"]]


def main():
    default = [HERE / f"{name}.json" for name in WRITERS]
    paths = [pathlib.Path(path) for path in sys.argv[1:]] or default
    for path in paths:
        document = json.loads(path.read_text())
        if document.get("rehearsal"):
            raise SystemExit(f"{path} is a rehearsal: its figures are no results")
        lines = _writer(document)(document)
        gpu = "-gpu" if document.get("device") == "gpu" else ""
        write(HERE / "RESULTS.md", document["benchmark"] + gpu, lines)


if __name__ == "__main__":
    main()
