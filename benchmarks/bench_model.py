"""Times a ResNet-50 at 224x224, batch 8, without gates and with four DAS gates.

    python benchmarks/bench_model.py          # everything: about half an hour on two cores
    python benchmarks/bench_model.py --device gpu --policy mixed_bfloat16  # batch 128, on the first GPU
    python benchmarks/bench_model.py --mode inference --models none-graph,native-graph --repetitions 5

Measures training steps and inference, with and without XLA, with the fused kernels and the reference. The
models alternate in separate processes; figures are medians over repetitions. On a GPU they run one after
another, because processes that share a GPU slow each other down. All gated models start from the same
weights, and their first results are compared. `report.py` writes the tables into RESULTS.md.
"""

import datetime
import os
import shlex
import sys
import tempfile

import machine
import report
from harness import DEVICES, Failed, OtherLoad, Worker, comma_separated, interleave, make_parser, write_json

MODELS = {
    f"{gates}-{how}": f"{text}, {'XLA' if how == 'xla' else 'graph'}"
    for how in ("graph", "xla")
    for gates, text in {
        "none": "no gates",
        "native": "four gates, native",
        "reference": "four gates, reference",
    }.items()
}
MODES = ("training", "inference")
# The largest deviation between the first results of gated models, relative to the largest value.
BOUND = {"float32": 1e-3, "mixed_float16": 2e-2, "mixed_bfloat16": 1e-1}


def main():
    options = parse_arguments()
    document = {
        "benchmark": "model",
        "device": options.device,
        "command": shlex.join(["python", "benchmarks/bench_model.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "threads": options.threads,
        "machine": machine.describe(),
        "versions": {},
        "missing": {},
        "cells": [],
    }
    turns = [options.models] if options.device == "cpu" else [[name] for name in options.models]
    with tempfile.TemporaryDirectory() as folder:
        for mode in options.mode:
            for names in turns:
                cells = time_models(names, mode, options, folder)
                for cell in cells:
                    document["versions"][cell["contender"]] = cell.pop("versions", {})
                document["cells"] += cells
                write_json(options.output, document)  # keeps the results of an interrupted run
    report.print_model(document)
    write_json(options.output, document)
    print(f"\nwritten to {options.output}")


def parse_arguments():
    parser = make_parser(__doc__, "model.json")
    add = parser.add_argument
    add("--mode", type=comma_separated(MODES), default=MODES, help=",".join(MODES))
    add("--models", type=comma_separated(MODELS), default=list(MODELS), help=",".join(MODELS))
    add("--device", choices=list(DEVICES), default="cpu")
    add("--policy", choices=list(BOUND), default="float32", help="Keras' dtype policy")
    add("--batch", type=int, help="batch size (default: 8, on a GPU 128)")
    add("--image-size", type=int, default=224)
    add("--network", default="ResNet50", help="a name in keras.applications, or tiny (default: ResNet50)")
    options = parser.parse_args()
    options.batch = options.batch or {"cpu": 8, "gpu": 128}[options.device]
    return options


def time_models(names, mode, options, folder) -> list[dict]:
    """One cell for each model, in new processes, so that memory is that of this mode."""
    cells, workers = {}, []
    for name in names:
        gates, _, how = name.partition("-")
        cells[name] = {
            "contender": name,
            "base": f"none-{how}",
            "mode": mode,
            "description": MODELS[name],
        }
        try:
            worker = Worker(name, "model_worker.py", options.threads, settings=DEVICES[options.device])
            workers.append(worker)
            chosen = ("network", "batch", "image_size", "device", "policy")
            arguments = {key: getattr(options, key) for key in chosen}
            cells[name] |= worker.ask("load", mode=mode, **arguments)
            path = os.path.join(folder, f"{mode}-{'none' if gates == 'none' else 'gated'}.npz")
            compare(worker, path, BOUND[options.policy])
        except Failed as failure:
            cells[name]["failed"] = str(failure)
            print(f"without {name}: {failure}", flush=True)
    ready = [worker for worker in workers if "failed" not in cells[worker.name]]
    load = OtherLoad(ready)
    figures, failures = interleave(ready, options.repetitions)
    cores = load.cores()
    for worker in workers:
        cell = cells[worker.name]
        cell |= {"other_load": cores, **figures.get(worker.name, {})}
        if worker.name in failures:
            cell["failed"] = failures[worker.name]
        elif "failed" not in cell:
            cell["memory"] = worker.ask("memory")
        worker.close()
    print(mode, {name: round(figure["milliseconds"], 1) for name, figure in figures.items()}, flush=True)
    return list(cells.values())


def compare(worker, path, bound):
    """Raises `Failed` unless the first result equals that of the first model of its kind."""
    if not os.path.exists(path):
        worker.ask("save", path=path)
        return
    error = worker.ask("error", path=path)
    if not error <= bound:
        raise Failed(f"its first results deviate by {error:.1e}, more than {bound:.0e}")


if __name__ == "__main__":
    main()
