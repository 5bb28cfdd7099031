"""Compares classifiers with DAS, without attention, with other attention and with controls, over seeds.

    python benchmarks/accuracy.py run clutter --seeds 0,1,2 --jobs 2
    python benchmarks/accuracy.py run woof --data FOLDER --variants "none;SE;DAS"
    python benchmarks/accuracy.py run grocery --data FOLDER --weights resnet18_imagenet.npz
    python benchmarks/accuracy.py run grocery_mobile --data FOLDER --weights mobilenet_v2.keras
    python benchmarks/accuracy.py report               # the tables, from accuracy.jsonl

Each run is a separate process with one thread. With the same seed, all variants see the same images in the
same order and start from the same trunk and head, and a rerun on the same kind of machine gives the same
figures. Every finished run appends a line to the record. Runs with a line are skipped, so an interrupted
comparison can be resumed. Logs and trained models are in runs/accuracy.
"""

import argparse
import concurrent.futures
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import threading
import time
from typing import Any

import accuracy_training
import machine
import records
from accuracy_tasks import TASKS
from accuracy_variants import VARIANTS

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "accuracy.jsonl"
RUNS = HERE.parent / "runs" / "accuracy"


def run(task: str, variants: list[str], seeds: list[int], jobs: int, arguments: list[str]) -> int:
    """Runs what the record lacks, and returns the number of failed runs."""
    done = {(line["task"], line["variant"], line["seed"]) for line in records.read(RECORD)}
    todo = [(task, variant, seed) for seed in seeds for variant in variants]
    lock, failed = threading.Lock(), []

    def run_one(key: tuple[str, str, int]) -> None:
        started = time.monotonic()
        line = _start_worker(key, arguments)
        took = f"{time.monotonic() - started:.0f} s"
        with lock:
            if line is None:
                failed.append(key)
                print(f"{key}: failed after {took}; see {_log(*key)}", flush=True)
                return
            records.append(RECORD, line)
            print(f"{key}: {line['test_accuracy']:.4f}, {took}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_one, [key for key in todo if key not in done]))
    return len(failed)


def _start_worker(key: tuple[str, str, int], arguments: list[str]) -> dict[str, Any] | None:
    """Runs one variant in a separate process, and returns its line."""
    command = [sys.executable, __file__, "worker", *map(str, key), *arguments]
    log = _log(*key)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            command, env=records.environment(), stdout=subprocess.PIPE, stderr=file, text=True
        )
    log_lines = done.stdout.splitlines()
    with log.open("a") as file:
        file.write(done.stdout)
    return json.loads(log_lines[-1]) if done.returncode == 0 and log_lines else None


def _log(task: str, variant: str, seed: int) -> pathlib.Path:
    return RUNS / task / f"{re.sub('[^a-z0-9.]+', '_', variant.lower())}-{seed}.log"


def work(task: str, variant: str, seed: int, data: pathlib.Path | None, weights: pathlib.Path | None) -> None:
    """Trains one model and prints its line."""
    save = _log(task, variant, seed).with_suffix(".keras")
    save.parent.mkdir(parents=True, exist_ok=True)
    figures = accuracy_training.train(TASKS[task], VARIANTS[variant], seed, data, weights, save=save)
    packages = ("keras", "keras-das", "tensorflow")
    line = {
        "task": task,
        "variant": variant,
        "seed": seed,
        **figures,
        "machine": machine.kind(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(json.dumps(line))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train the runs that the record lacks")
    runner.add_argument("task", choices=TASKS)
    runner.add_argument("--variants", help="variants separated by semicolons (default: all)")
    runner.add_argument("--seeds", default="0,1,2")
    runner.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    worker = commands.add_parser("worker", help="one run; started by `run`")
    worker.add_argument("task", choices=TASKS)
    worker.add_argument("variant", choices=VARIANTS)
    worker.add_argument("seed", type=int)
    for command in (runner, worker):
        command.add_argument("--data", type=pathlib.Path, help="folder with train/CLASS and test/CLASS")
        command.add_argument(
            "--weights",
            type=pathlib.Path,
            help="archive of the ResNet-18's ImageNet weights, or the MobileNetV2 as a Keras file",
        )
    commands.add_parser("report", help="write the tables into RESULTS.md")
    options = parser.parse_args()
    if options.command == "report":
        import accuracy_report

        order = list(VARIANTS)
        record = sorted(records.read(RECORD), key=lambda line: (order.index(line["variant"]), line["seed"]))
        accuracy_report.write(record, {name: task.title for name, task in TASKS.items()})
        return 0
    if options.command == "worker":
        work(options.task, options.variant, options.seed, options.data, options.weights)
        return 0
    variants = options.variants.split(";") if options.variants else list(VARIANTS)
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants: {unknown[0]!r} is none of {'; '.join(VARIANTS)}")
    arguments = []
    for name in ("data", "weights"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name).resolve())]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    return run(options.task, variants, seeds, options.jobs, arguments) > 0


if __name__ == "__main__":
    sys.exit(main())
