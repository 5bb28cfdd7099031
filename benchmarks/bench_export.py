"""Measures the time and error of a ResNet-18 with four DAS gates in each format of `keras_das.export`.

    python benchmarks/bench_export.py         # everything: a few minutes on two cores
    python benchmarks/bench_export.py --forms keras,onnx --image-size 96 --batches 1

Keras and each format in its runtime, with and without gates, alternate in separate processes. Figures are
medians over repetitions. `report.py benchmarks/export.json` writes the table into RESULTS.md.
"""

import datetime
import json
import shlex
import sys
import tempfile

import machine
import report
from harness import Failed, OtherLoad, Worker, comma_separated, interleave, make_parser

FORMS = {
    "keras": "Keras, `predict_on_batch`",
    "saved_model": "SavedModel, TensorFlow",
    "onnx": "ONNX, onnxruntime",
    "openvino": "OpenVINO",
    "litert": "LiteRT",
}
GATES = ("plain", "gated")
SCRIPT = "export_worker.py"


def main():
    options = parse_arguments()
    document = {
        "benchmark": "export",
        "command": shlex.join(["python", "benchmarks/bench_export.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "threads": options.threads,
        "image_size": options.image_size,
        "machine": machine.describe(),
        "versions": {},
        "missing": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for gates in GATES:
            writer = Worker(f"{gates}-keras", SCRIPT, options.threads)
            writer.ask("write", folder=folder, batches=options.batches, image_size=options.image_size)
            writer.close()
        document["cells"] = [cell for batch in options.batches for cell in time_batch(batch, options, folder)]
    for cell in document["cells"]:
        document["versions"] |= {cell["form"]: cell.pop("versions", {})}
    print("\n" + "\n".join(report.export_lines(document)))
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten to {options.output}")


def parse_arguments():
    parser = make_parser(__doc__, "export.json")
    add = parser.add_argument
    add("--forms", type=comma_separated(FORMS), default=list(FORMS), help=",".join(FORMS))
    add("--batches", type=lambda text: [int(size) for size in text.split(",")], default=[1, 8])
    add("--image-size", type=int, default=224)
    return parser.parse_args()


def time_batch(batch, options, folder) -> list[dict]:
    """One cell for each form, with and without gates."""
    cells, workers = {}, []
    for name in [f"{gates}-{form}" for form in options.forms for gates in GATES]:
        gates, _, form = name.partition("-")
        cells[name] = {"contender": name, "form": form, "gates": gates, "mode": f"batch {batch}"}
        cells[name]["description"] = FORMS[form]
        try:
            worker = Worker(name, SCRIPT, options.threads)
            workers.append(worker)
            cells[name] |= worker.ask("load", folder=folder, batch=batch, threads=options.threads)
            cells[name]["error"] = worker.ask("error")
        except Failed as failure:
            cells[name]["failed"] = str(failure)
    ready = [worker for worker in workers if "failed" not in cells[worker.name]]
    load = OtherLoad(ready)
    figures, failures = interleave(ready, options.repetitions)
    cores = load.cores()
    for name, cell in cells.items():
        cell |= {"other_load": cores, **figures.get(name, {})}
        if name in failures:
            cell["failed"] = failures[name]
    for worker in workers:
        worker.close()
    return list(cells.values())


if __name__ == "__main__":
    main()
