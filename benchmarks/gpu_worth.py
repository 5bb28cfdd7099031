"""Trains classifiers with and without attention for gpu_report.py.

    python gpu_worth.py DEVICE TASK:FOLDER RESULT

All variants train in one process, seed by seed, with XLA and in mixed bfloat16. Every finished run appends a
line to RESULT, and runs with a line are skipped. FOLDER contains train/CLASS and test/CLASS. With "toy"
instead of TASK:FOLDER, two variants train on a few images of noise.
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import sys
import tempfile

import keras
import numpy as np
from PIL import Image

import accuracy_training
import harness
import machine
from accuracy_tasks import TASKS, Task
from accuracy_variants import VARIANTS

CHOSEN = ("none", "DAS", "SE", "DAS, offsets frozen at 0")
SEEDS = (0, 1, 2)
EXECUTION = accuracy_training.Execution("mixed_bfloat16", jit_compile=True, epoch_in_one_call=True)


def main(device: str, data: str, path: pathlib.Path) -> None:
    """Trains the runs that RESULT lacks."""
    task_name, _, folder = data.partition(":")
    with tempfile.TemporaryDirectory() as made:
        if task_name == "toy":
            task_name, folder = "woof", made
            draw_toy(pathlib.Path(made))
        task, variants, seeds = TASKS[task_name], CHOSEN, SEEDS
        if data == "toy":
            recipe = dataclasses.replace(task.recipe, epochs=2, batch_size=4)
            trunk = TASKS["clutter"].trunk  # four convolutions, which XLA compiles in less time
            task = dataclasses.replace(task, recipe=recipe, trunk=trunk, title="Images of noise")
            variants, seeds = CHOSEN[:2], SEEDS[:1]
        # The images are loaded once for all runs.
        task = dataclasses.replace(task, load=functools.cache(task.load))
        document = {"task": task_name, "title": task.title, "lines": []}
        if path.exists():
            document = json.loads(path.read_text())
        done = {(line["task"], line["variant"], line["seed"]) for line in document["lines"]}
        for seed in seeds:
            for variant in variants:
                if (task_name, variant, seed) not in done:
                    keras.utils.clear_session()
                    document["lines"].append(
                        train(task_name, task, variant, seed, pathlib.Path(folder), device)
                    )
                    harness.write_json(path, document)


def train(name: str, task: Task, variant: str, seed: int, folder: pathlib.Path, device: str) -> dict:
    """One run, as a line of the record of accuracy.py."""
    figures = accuracy_training.train(task, VARIANTS[variant], seed, folder, None, EXECUTION)
    print(f"{name}, {variant}, seed {seed}: {figures['test_accuracy']:.4f}", flush=True)
    where = machine.describe()["gpu"] if device == "gpu" else machine.kind()
    version = importlib.metadata.version("tensorflow")
    return {
        "task": name,
        "variant": variant,
        "seed": seed,
        **figures,
        "machine": f"{where}, TensorFlow {version}, mixed bfloat16, XLA",
    }


def draw_toy(folder: pathlib.Path) -> None:
    """Twelve images of noise in two classes, one of which is brighter."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(100 * label, 100 + 100 * label, (80, 90, 3), dtype="uint8")
                Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{number}.jpg")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
