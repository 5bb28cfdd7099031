"""Verifies and measures the package on a GPU in one command.

    python benchmarks/gpu_report.py --budget 540 --data woof:FOLDER     # on a machine with an NVIDIA GPU
    python benchmarks/gpu_report.py --device cpu --budget 400           # a rehearsal with small sizes
    python benchmarks/report.py runs/gpu/report.json                    # into RESULTS.md

The report has three phases: "right" verifies kernels, layers and training steps; "fast" compares the speed of
the operation and of a ResNet-50 with alternatives; "worth" trains classifiers with and without attention.
Each phase has a share of the budget, and the next phase inherits the time that it does not use. Each check
runs in a separate process with a time limit. OUTPUT/report.jsonl records the outcome of every finished check,
and OUTPUT/checks contains their output. Repeat the command to resume an interrupted report: checks that have
passed are not repeated. A new report starts if the package's sources, the GPU or the data have changed.

Requires TensorFlow or JAX, and a kernel library (`keras-das build --cuda --framework all`). Alternatives that
are not installed are omitted. `gpu_pack.py` packs the files for a machine without a network.
"""

import argparse
import datetime
import functools
import hashlib
import os
import pathlib
import shlex
import sys
import time

import gpu_plan
import gpu_runner
import gpu_tables
import harness
import machine

ROOT = pathlib.Path(__file__).parents[1]


def main() -> int:
    """The command line; returns 1 if a check has failed."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    prepare_environment(options.device)
    checks = [c for c in gpu_plan.checks(options.device, options.data) if c.phase in options.phases]
    ends = phase_ends(options.device, options.phases, time.monotonic(), options.budget)
    journal = gpu_runner.Journal(options.output / "report.jsonl", about(options))
    folder = options.output / "checks"
    folder.mkdir(exist_ok=True)
    start = functools.partial(gpu_runner.start_process, folder=folder)
    gpu_runner.run(checks, journal, ends, start)
    # Including the outcomes of phases that an earlier run completed.
    everything = list(gpu_plan.checks(options.device, options.data))
    document = {
        "benchmark": "gpu-report",
        "rehearsal": options.device == "cpu",
        "command": shlex.join(["python", "benchmarks/gpu_report.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "outcomes": gpu_runner.summarize(everything, journal),
    }
    harness.write_json(options.output / "report.json", document)
    print("\n" + "\n".join(gpu_tables.lines(document)))
    print(f"\nwritten to {options.output / 'report.json'}")
    return int(any(outcome["status"] in ("failed", "timed out") for outcome in document["outcomes"]))


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=float, default=540, help="total time in seconds (default: 540)")
    add("--device", choices=list(gpu_plan.SHARES), default="gpu")
    add("--data", help="training images: woof:FOLDER or dogs:FOLDER, with train/ and test/")
    phases = ",".join(gpu_plan.PHASES)
    add("--phases", type=harness.comma_separated(gpu_plan.PHASES), default=gpu_plan.PHASES, help=phases)
    add("--output", type=pathlib.Path, default=ROOT / "runs" / "gpu", help="a folder (default: runs/gpu)")
    options = parser.parse_args()
    options.output, options.data = options.output.resolve(), data_folder(parser, options.data)
    return options


def data_folder(parser: argparse.ArgumentParser, text: str | None) -> str | None:
    """The value of `--data` with an absolute path; exits with an error if it is invalid."""
    if text is None:
        return None
    task, _, folder = text.partition(":")
    path = pathlib.Path(folder).resolve()
    if task not in ("woof", "dogs") or not all((path / part).is_dir() for part in ("train", "test")):
        parser.error(
            f"--data must be woof:FOLDER or dogs:FOLDER, with train/ and test/ in FOLDER, not {text!r}"
        )
    return f"{task}:{path}"


def prepare_environment(device: str) -> None:
    """Sets the environment variables of all checks."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {**harness.DEVICES[device], "PYTHONPATH": os.pathsep.join(paths)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Unpacked wheels contain no bytecode. Without a cache, each check compiles the sources of TensorFlow.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def phase_ends(device: str, phases: list[str], now: float, budget: float) -> dict[str, float]:
    """The end of each phase on the clock: the selected phases share the budget."""
    shares = dict(zip(gpu_plan.PHASES, gpu_plan.SHARES[device], strict=True))
    chosen = [phase for phase in gpu_plan.PHASES if phase in phases]
    whole, so_far, ends = sum(shares[phase] for phase in chosen), 0.0, {}
    for phase in chosen:
        so_far += shares[phase]
        ends[phase] = now + budget * so_far / whole
    return ends


def about(options: argparse.Namespace) -> dict[str, str]:
    """The subject of a report. An interrupted report can be resumed if it is unchanged."""
    hashed = hashlib.sha256()
    for path in sorted((ROOT / "keras_das").rglob("*")):
        if path.suffix in (".py", ".cc", ".h"):
            hashed.update(path.read_bytes())
    return {
        "device": options.device,
        "data": options.data or "",
        "gpu": machine.describe()["gpu"],
        "sources": hashed.hexdigest()[:16],
    }


if __name__ == "__main__":
    sys.exit(main())
