"""Compares RetinaNets with DAS gates and without on photographs with boxes, over seeds.

    python benchmarks/detection.py run --data FOLDER --weights resnet18_imagenet.npz --seeds 0,1,2
    python benchmarks/detection.py report              # the table, from detection.jsonl

FOLDER is a Pascal VOC folder (Annotations, JPEGImages, ImageSets/Main). The backbone is the ResNet-18 of
accuracy_tasks.py with ImageNet weights. Each run is a call of examples/detect.py with one thread, and
appends a line to the record. Runs with a line are skipped, so an interrupted comparison can be resumed.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import accuracy_report
import accuracy_tasks
import machine
import records
import report

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
RECORD = HERE / "detection.jsonl"
RUNS = ROOT / "runs" / "detection"
VARIANTS = {
    "none": ["--attention", "none"],
    "DAS": ["--attention", "das", "--gate-rate", "10"],
    "DAS, gates at the rate of the other weights": ["--attention", "das"],
}
# Fixed before the first comparison, and the same for all variants.
RECIPE = {"image-size": 256, "head-layers": 1, "batch-size": 8, "epochs": 10, "learning-rate": 5e-4}


def save_preset(weights: pathlib.Path, folder: pathlib.Path) -> None:
    """Saves the ResNet-18 of `weights` as a KerasHub preset, with the mean that it subtracts."""
    import keras_hub
    import numpy as np

    accuracy_tasks.resnet18_backbone(None, weights).save_to_preset(folder)
    mean = np.load(weights)["mean_rgb"]
    converter = keras_hub.layers.ResNetImageConverter(scale=1.0, offset=(-mean).tolist())
    converter.save_to_preset(folder)


def run(data: pathlib.Path, weights: pathlib.Path, seeds: list[int], variants: list[str]) -> int:
    """Trains the runs that the record lacks, and returns the number of failed runs."""
    preset = RUNS / "resnet18"
    if not preset.exists():
        save_preset(weights, preset)
    done, failed = {(line["variant"], line["seed"]) for line in records.read(RECORD)}, 0
    for seed in seeds:
        for variant in variants:
            if (variant, seed) in done:
                continue
            line = _train(data, preset, variant, seed)
            failed += line is None
            if line is not None:
                records.append(RECORD, line)
            print(f"{variant}, seed {seed}: {line and line['AP50']}", flush=True)
    return failed


def _train(data: pathlib.Path, preset: pathlib.Path, variant: str, seed: int) -> dict | None:
    """One run in a separate process, as a line of the record; `None` if it fails."""
    output = RUNS / f"{variant}-{seed}"
    arguments = ["--data", f"voc:{data}", "--backbone", str(preset), "--weights", "preset"]
    arguments += [f"--{name}={value}" for name, value in RECIPE.items()]
    arguments += ["--score-every", "100", "--seed", str(seed), "--progress", "lines", "--output", str(output)]
    with (RUNS / f"{variant}-{seed}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "examples" / "detect.py"), *arguments, *VARIANTS[variant]]
        done = subprocess.run(
            command, env=records.environment(), stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        return None
    results = json.loads((output / "results.json").read_text())
    names = ("AP", "AP50", "images", "train_seconds", "parameters")
    figures = {name: results[name] for name in names if name in results}
    return {"variant": variant, "seed": seed, **figures, "machine": machine.kind()}


def lines_of(record: list[dict]) -> list[str]:
    """Markdown of the record."""
    rows = []
    for metric in ("AP", "AP50"):
        scores = {
            variant: {line["seed"]: 100 * line[metric] for line in record if line["variant"] == variant}
            for variant in VARIANTS
        }
        for variant, by_seed in scores.items():
            if by_seed:
                found = accuracy_report.compare(by_seed, scores["none"]) if variant != "none" else None
                rows.append(
                    [
                        metric,
                        variant,
                        f"{statistics.mean(by_seed.values()):.1f}",
                        ", ".join(f"{by_seed[seed]:.1f}" for seed in sorted(by_seed)),
                        "{:+.1f} ({:+.1f} to {:+.1f})".format(*found) if found else "-",
                    ]
                )
    return report.table(["", "attention", "mean", "by seed", "minus none, 95 % interval"], rows)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train the runs that the record lacks")
    runner.add_argument("--data", type=pathlib.Path, required=True, help="a Pascal VOC folder")
    runner.add_argument("--weights", type=pathlib.Path, required=True, help="ImageNet weights of a ResNet-18")
    runner.add_argument("--seeds", default="0,1,2")
    runner.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    commands.add_parser("report", help="write the table into RESULTS.md")
    options = parser.parse_args()
    if options.command == "report":
        report.write(HERE / "RESULTS.md", "detection", lines_of(records.read(RECORD)))
        return 0
    RUNS.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    return run(options.data.resolve(), options.weights, seeds, options.variants.split(";")) > 0


if __name__ == "__main__":
    sys.exit(main())
