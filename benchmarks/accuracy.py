"""Does DAS help? Trains classifiers with and without it, and with other attention, over several seeds.

    python benchmarks/accuracy.py run cifar10 --data folder:PATH --seeds 0,1,2
    python benchmarks/accuracy.py run cifar10 --data folder:PATH --attention none,das --jobs 2
    python benchmarks/accuracy.py report               # the tables and the plot, from accuracy.jsonl

Each run is `examples/classify.py`'s own training in a process of its own, on one thread: with one seed, runs
see the same images in the same order, start from the same backbone and head, and a rerun gives the same
figures. A finished run is a line of the record; what has its line is not run again, so that an interrupted
comparison goes on where it was. The processes have the lowest priority.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from typing import Any

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "accuracy.jsonl"
RUNS = HERE.parent / "runs" / "accuracy"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe, the same for all, and what is compared under it: changes to `examples.classify.Config`."""

    title: str
    recipe: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    base: str
    """What they are compared with: experiment/variant."""


# SGD and a cosine, as is usual for ResNets on CIFAR-10, on a fifth of the images and for 6 epochs, which is
# what two cores can do. Fixed before the first comparison, and tuned for none of the modules.
_SGD = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 5e-3,  # apart from the gradient; 5e-4 in it acts ten times, by momentum
    "label_smoothing": 0.0,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "norm_momentum": 0.9,
    "augment": "crop",
    "jit": "off",
}
_CIFAR = {**_SGD, "backbone": "resnet20", "image_size": 32, "batch_size": 64, "epochs": 6, "data_share": 0.2}
_DAS = {"attention": "das"}
EXPERIMENTS = {
    "cifar10": Experiment(
        "CIFAR-10, ResNet-20, a fifth of the training images, 6 epochs, from scratch",
        _CIFAR,
        {name: {"attention": name} for name in ("none", "das", "se", "cbam", "eca", "triplet")},
        base="cifar10/none",
    ),
    "ablation": Experiment(
        "The same, one thing changed in DAS at a time",
        _CIFAR,
        {
            "alpha 0.1": {**_DAS, "das": {"reduction": 0.1}},
            "alpha 0.5": {**_DAS, "das": {"reduction": 0.5}},
            "dense": {**_DAS, "das": {"deformable": "dense"}},
            "not modulated": {**_DAS, "das": {"modulated": False}},
            "offsets frozen at 0": {"attention": "das_frozen"},
            "alpha 0.5 with 2 offset groups": {**_DAS, "das": {"reduction": 0.5, "offset_groups": 2}},
            "gate after every block": {"attention": "das_blocks"},
            "norm over space too": {"attention": "das_spatial_norm"},
            "identity start": {**_DAS, "identity_init": "on"},
            "identity start 16 times as fast": {"attention": "das_gained"},
        },
        base="cifar10/das",
    ),
    "finetune": Experiment(
        "Three more epochs from the model without attention, learning rate 0.01",
        {**_CIFAR, "epochs": 3, "learning_rate": 0.01, "warmup_epochs": 0.5, "weights": "cifar10/none"},
        {
            "none": {"attention": "none"},
            "das with identity start": {**_DAS, "identity_init": "on"},
            "das with identity start 16 times as fast": {"attention": "das_gained"},
            "das with the paper's gate": {**_DAS, "identity_init": "off"},
        },
        base="finetune/none",
    ),
    "flowers": Experiment(
        "Flowers, ResNet-18 at 96 pixels, from scratch",
        {
            **_SGD,
            "learning_rate": 0.05,
            "backbone": "resnet18",
            "image_size": 96,
            "batch_size": 32,
            "epochs": 8,
        },
        {name: {"attention": name} for name in ("none", "das", "se", "cbam")},
        base="flowers/none",
    ),
}


def run(experiment: str, names: list[str], seeds: list[int], data: str, jobs: int, threads: int) -> int:
    """Runs what the record lacks, and returns how many runs failed."""
    done = {(line["experiment"], line["variant"], line["seed"]) for line in read_record()}
    todo = [(experiment, name, seed) for seed in seeds for name in names]
    lock, failed = threading.Lock(), []

    def run_one(key: tuple[str, str, int]) -> None:
        started = time.monotonic()
        line = _start_worker(key, data, threads)
        took = f"{time.monotonic() - started:.0f} s"
        with lock:
            if line is None:
                failed.append(key)
                print(f"{key}: failed after {took}; see {_folder(*key)}.log", flush=True)
                return
            with RECORD.open("a") as file:
                file.write(line + "\n")
            print(f"{key}: {json.loads(line)['test_accuracy']:.4f}, {took}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_one, [key for key in todo if key not in done]))
    return len(failed)


def _start_worker(key: tuple[str, str, int], data: str, threads: int) -> str | None:
    """A run in a process of its own; returns its line."""
    command = [sys.executable, __file__, "worker", *map(str, key), "--data", data]
    environment = {
        **os.environ,
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    log = pathlib.Path(f"{_folder(*key)}.log")  # "alpha 0.1" has a dot of its own
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            ["nice", "-n", "19", *command], env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
    return done.stdout.splitlines()[-1] if done.returncode == 0 and done.stdout else None


def _folder(experiment: str, variant: str, seed: int) -> pathlib.Path:
    return RUNS / experiment / f"{re.sub('[^a-z0-9.]+', '_', variant)}-{seed}"


def work(experiment: str, variant: str, seed: int, data: str) -> None:
    """Trains one model, and prints its line."""
    sys.path.insert(0, str(HERE.parent))
    from examples import classify  # here, for the settings of the process must come first

    import accuracy_models

    chosen = EXPERIMENTS[experiment]
    settings = {**chosen.recipe, **chosen.variants[variant]}
    if "weights" in settings:
        of_experiment, of_variant = settings["weights"].split("/")
        settings["weights"] = str(_folder(of_experiment, of_variant, seed) / "model.keras")
    output = str(_folder(experiment, variant, seed))
    accuracy_models.register(classify)
    config = classify.Config(**settings, data=data, seed=seed, output=output, progress="lines")
    with contextlib.redirect_stdout(sys.stderr):  # the log
        results = classify.train(config)
    keep = ("test_accuracy", "test_accuracy_before", "parameters", "seconds_per_step", "train_seconds")
    line = {
        "experiment": experiment,
        "variant": variant,
        "seed": seed,
        **{name: results[name] for name in keep if name in results},
        "images": results["images"],
        **accuracy_models.describe(pathlib.Path(output) / "model.keras", config),
        "history": {name: results["history"][name] for name in ("loss", "accuracy", "val_accuracy")},
        "settings": settings,
        "versions": results["versions"],
    }
    print(json.dumps(line))


def read_record() -> list[dict[str, Any]]:
    """The lines of the record so far."""
    if not RECORD.exists():
        return []
    return [json.loads(line) for line in RECORD.read_text().splitlines()]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what the record lacks")
    runner.add_argument("experiment", choices=EXPERIMENTS)
    runner.add_argument("--attention", dest="variants", help="which variants, with commas; default: all")
    runner.add_argument("--seeds", default="0,1,2")
    runner.add_argument("--data", required=True, help="see examples/classify.py")
    runner.add_argument("--jobs", type=int, default=1, help="runs at a time")
    runner.add_argument("--threads", type=int, default=1, help="of a run; above 1 a rerun can differ")
    worker = commands.add_parser("worker", help="one run; for `run` to start")
    worker.add_argument("experiment", choices=EXPERIMENTS)
    worker.add_argument("variant")
    worker.add_argument("seed", type=int)
    worker.add_argument("--data", required=True)
    commands.add_parser("report", help="write the tables into RESULTS.md, and the plot beside it")
    options = parser.parse_args()
    if options.command == "worker":
        work(options.experiment, options.variant, options.seed, options.data)
        return 0
    if options.command == "report":
        import accuracy_report

        accuracy_report.write(read_record(), EXPERIMENTS)
        return 0
    variants = EXPERIMENTS[options.experiment].variants
    names = (
        options.variants.split(";" if ";" in options.variants else ",")
        if options.variants
        else list(variants)
    )
    unknown = [name for name in names if name not in variants]
    if unknown:
        parser.error(f"--attention: {unknown[0]!r} is none of {', '.join(variants)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    return run(options.experiment, names, seeds, options.data, options.jobs, options.threads) > 0


if __name__ == "__main__":
    sys.exit(main())
