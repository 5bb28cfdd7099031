"""Times deformable convolution: keras_das and its alternatives, in one run.

    python benchmarks/bench_op.py                                   # everything: about an hour on two cores
    python benchmarks/bench_op.py --op depthwise --mode forward --shapes 8x56x56x51 --repetitions 5
    python benchmarks/bench_op.py --contenders native-eager,gather-taps-xla --output /tmp/op.json
    python benchmarks/bench_op.py --device gpu                      # batches of 64, on the first NVIDIA GPU

Contenders alternate in separate processes; figures are medians over repetitions. The results of each
contender are compared with float64 NumPy loops on a small problem, and with the other contenders on each
timed problem. benchmarks/environments.sh creates the environments of the alternatives; missing ones are
reported. `report.py` writes the tables into RESULTS.md.

On a GPU, contenders run one after another, because processes that share a GPU slow each other down. Calls are
queued in batches, and the time of a batch is divided by its calls. The floor is that of the bytes moved at
the copy bandwidth of the GPU; memory is not measured.
"""

import datetime
import os
import pathlib
import shlex
import sys
import tempfile

import numpy as np

import machine
import report
from contenders import CONTENDERS, ON_GPU, ON_REQUEST
from harness import (
    DEVICES,
    GIVE_BACK,
    Failed,
    OtherLoad,
    Worker,
    comma_separated,
    interleave,
    make_parser,
    write_json,
)
from problem import DTYPES, GPU_SHAPES, MODES, OPERATIONS, SHAPES, Problem

sys.path.append(str(pathlib.Path(__file__).parents[1]))
from tests import oracle

# The largest deviation relative to the largest value: some alternatives compute positions in float16.
SMALL, SMALL_BOUND = "2x7x6x8", {"float32": 1e-5, "float16": 5e-2}
# float32 sums of up to 25,600 terms, each in an order of its own. In float16, some peers have no positions
# between pixels far from the corner.
BOUND = {"float32": 1e-4, "float16": None}


def main():
    options = parse_arguments()
    document = {
        "benchmark": "op",
        "device": options.device,
        "dtype": options.dtype,
        "command": shlex.join(["python", "benchmarks/bench_op.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "threads": options.threads,
        "machine": machine.describe(),
        "rates": measure_cpu(options) or "neither TensorFlow nor JAX on a GPU",
        "versions": {},
        "missing": {},
        "cells": [],
        "memory": [],
    }
    problems = [(o, mode, shape) for o in options.op for mode in options.mode for shape in options.shapes[o]]
    # A problem's tensors serve one mode after the other.
    in_order = sorted(problems, key=lambda problem: (options.op.index(problem[0]), problem[2]))
    # The kernels are compared with the others, not vice versa.
    contenders = sorted(options.contenders, key=lambda name: CONTENDERS[name].native)
    with tempfile.TemporaryDirectory() as folder:
        expected = {operation: write_expected(operation, options.dtype, folder) for operation in options.op}
        for names in [[name] for name in contenders] if options.alone else [contenders]:
            workers = start(names, options, document, expected)
            if options.device == "gpu":
                document["rates"] = measure_gpu(workers) or document["rates"]
            for problem in in_order:
                document["cells"] += time_cell(workers, *problem, options, folder)
                write_json(options.output, document)  # keeps the results of an interrupted run
            for worker in workers:
                worker.close()
    document["cells"].sort(key=lambda cell: problems.index((cell["op"], cell["mode"], cell["shape"])))
    if rates := measure_cpu(options):
        document["rates"] = machine.better(document["rates"], rates)
    document["memory"] = measure_memory(options)
    report.print_op(document)
    write_json(options.output, document)
    print(f"\nwritten to {options.output}")


def parse_arguments():
    parser = make_parser(__doc__, "op.json")

    here = [name for name, contender in CONTENDERS.items() if not contender.environment]
    add = parser.add_argument
    op_help = f"{','.join(OPERATIONS)} (default: all on a GPU, without the last on a CPU)"
    add("--op", type=comma_separated(OPERATIONS), help=op_help)
    add("--mode", type=comma_separated(MODES), default=MODES, help=",".join(MODES))
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", choices=list(DEVICES), default="cpu")
    add("--no-rates", dest="rates", action="store_false", help="do not measure the peak rates of the CPU")
    alone_help = "one contender after another, as on a GPU, rather than all in turn"
    add("--alone", action="store_true", help=alone_help)
    add("--shapes", type=lambda text: text.split(","), help="shapes of the inputs: NxHxWxC,...")
    add("--contenders", type=comma_separated(CONTENDERS), help=",".join(CONTENDERS))
    memory_help = f"contenders whose memory is measured: {','.join(here)}"
    add("--memory", type=comma_separated(here), default=["native-eager"], help=memory_help)
    add("--no-memory", dest="memory", action="store_const", const=[], help="do not measure memory")
    options = parser.parse_args()
    gpu = options.device == "gpu"
    options.alone |= gpu
    options.op = options.op or [name for name in OPERATIONS if gpu or name != "aggregation"]
    shapes = GPU_SHAPES if gpu else dict.fromkeys(OPERATIONS, SHAPES)
    options.shapes = {name: options.shapes or shapes[name] for name in options.op}
    default = ON_GPU if gpu else [name for name in CONTENDERS if name not in ON_REQUEST]
    options.contenders = options.contenders or default
    options.memory = [] if gpu else options.memory
    return options


def measure_cpu(options) -> dict | str | None:
    """What the CPU copies and computes a second, where that is what is measured."""
    if options.device == "gpu":
        return None
    return machine.measure_rates(options.threads) if options.rates else "it was not measured"


def measure_gpu(workers) -> dict | None:
    """What the GPU copies a second, by the first contender that runs on TensorFlow or JAX."""
    for worker in workers:
        if not CONTENDERS[worker.name].environment:
            return {"copy_bytes_per_second": worker.ask("copy_rate")}
    return None


def start(names, options, document, expected) -> list[Worker]:
    """A worker for each available contender whose results equal those of the oracle."""
    workers = []
    for name in names:
        try:
            workers.append(start_one(name, options, document, expected))
        except Failed as failure:
            document["missing"][name] = str(failure)
            print(f"without {name}: {failure}", flush=True)
    return workers


def start_one(name, options, document, expected) -> Worker:
    contender, settings = CONTENDERS[name], DEVICES[options.device]
    worker = Worker(name, "op_worker.py", options.threads, contender.environment, settings)
    try:
        document["versions"][name] = worker.ask("load", threads=options.threads, device=options.device)
        for operation in set(options.op) & set(contender.operations):
            for mode in set(options.mode) & set(contender.modes):
                worker.ask("prepare", operation=operation, shape=SMALL, mode=mode, dtype=options.dtype)
                check(worker, expected[operation][mode], SMALL_BOUND[options.dtype], "float64 loops")
                if options.device == "gpu" and worker.ask("device") != "GPU":
                    raise Failed("it does not run on the GPU")
    except Failed:
        worker.close()
        raise
    return worker


def write_expected(operation, dtype, folder) -> dict[str, str]:
    """The small problem's results for each mode, by the loops that the tests measure everything with."""
    problem = Problem(operation, SMALL, dtype)
    arrays = dict(problem.arrays)
    upstream = arrays.pop("grad_output")
    output = oracle.deformable_conv2d(**arrays, padding="same")
    gradients = oracle.deformable_conv2d_gradients(upstream, **arrays, padding="same")
    results = [output, *(gradients[name] for name in problem.differentiated)]
    paths = {mode: os.path.join(folder, f"{operation}_{mode}.npz") for mode in MODES}
    np.savez(paths["forward"], output)
    np.savez(paths["forward_backward"], *results)
    return paths


def check(worker, path, bound, of):
    """Raises `Failed` unless the results equal those of a file."""
    error = worker.ask("error", path=path)
    if not error <= bound:
        raise Failed(f"its results are not those of {of}: they deviate by {error:.1e}, more than {bound:.0e}")


def time_cell(workers, operation, mode, shape, options, folder) -> list[dict]:
    """Times one problem for every contender that supports it; all results must equal the first."""
    ready, failures = [], {}
    path = os.path.join(folder, f"{operation}-{mode}-{shape}.npz")
    for worker in [worker for worker in workers if CONTENDERS[worker.name].can(operation, mode)]:
        try:
            worker.ask("prepare", operation=operation, shape=shape, mode=mode, dtype=options.dtype)
            if os.path.exists(path):
                check(worker, path, BOUND[options.dtype], "the first contender")
            elif len(options.contenders) > 1 and BOUND[options.dtype]:
                worker.ask("save", path=path)
            ready.append(worker)
        except Failed as failure:
            failures[worker.name] = str(failure)
    if not options.alone:  # otherwise, later contenders need it
        pathlib.Path(path).unlink(missing_ok=True)
    load = OtherLoad(ready)
    figures, failed = interleave(ready, options.repetitions)
    cell = {"op": operation, "mode": mode, "shape": shape, "other_load": load.cores()}
    failures |= failed
    times = {name: round(figure["milliseconds"], 2) for name, figure in figures.items()}
    print(operation, mode, shape, times, flush=True)
    for name, reason in failures.items():
        print(f"  {name} failed: {reason}", flush=True)
    return [
        *({**cell, "contender": name, **figure} for name, figure in figures.items()),
        *({**cell, "contender": name, "failed": reason} for name, reason in failures.items()),
    ]


def measure_memory(options) -> list[dict]:
    """Measures each figure in a separate process."""
    rows = []
    for name in options.memory:
        for operation in options.op:
            for mode in options.mode:
                for shape in options.shapes[operation]:
                    row = {"contender": name, "op": operation, "mode": mode, "shape": shape}
                    rows.append(row)
                    worker = Worker(name, "op_worker.py", options.threads, settings=GIVE_BACK)
                    try:
                        worker.ask("load", threads=options.threads)
                        row["bytes"] = worker.ask("memory", operation=operation, shape=shape, mode=mode)
                    except Failed as failure:
                        row["failed"] = str(failure)
                        print(f"memory of {name}, {operation}, {mode}, {shape}: {failure}", flush=True)
                    worker.close()
    return rows


if __name__ == "__main__":
    main()
