"""The checks of gpu_report.py in order of priority, for a GPU or, with small sizes, for a CPU."""

import os
import pathlib
from collections.abc import Iterator

from gpu_runner import Check

HERE = pathlib.Path(__file__).parent
PHASES = ("right", "fast", "worth")
# Shares of the budget. On a CPU, compilation dominates.
SHARES = {"gpu": (150 / 540, 150 / 540, 240 / 540), "cpu": (0.45, 0.35, 0.2)}
TENSORFLOW, JAX = {"KERAS_BACKEND": "tensorflow"}, {"KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1"}
# Autotuning does not pay for programs that run once. Flags of the machine are kept.
UNTUNED = {**TENSORFLOW, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()}

RIGHT = {  # expected seconds on a GPU
    "xla": 25,
    "op": 25,
    "training-mixed_bfloat16": 30,
    "training-float32": 30,
    "training-mixed_float16": 30,
    "jax": 15,
    "determinism": 15,
}
# Expected seconds by contender and dtype. Loops measure the kernels, eager calls the launch overhead.
FAST = {
    ("native-xla-loop", "float32"): 25,
    ("deformops", "float32"): 20,
    ("torchvision", "float32"): 20,
    ("native-xla-loop", "float16"): 25,
    ("deformops", "float16"): 20,
    ("torchvision", "float16"): 20,
    ("native-eager", "float32"): 20,
    ("native-jax", "float32"): 20,
    ("tvdcn", "float32"): 20,
    ("reference-xla-loop", "float32"): 40,
    ("dcnv4", "float32"): 15,
}
_OPERATIONS = {"native-xla-loop": "depthwise,dense,aggregation", "dcnv4": "aggregation"}
_AFTER = ("torchvision", "float32")  # the models run after this check
MODEL = {"training": 60, "inference": 45}
# Not rehearsed: they differ from a rehearsed check only in an argument.
_GPU_ONLY = ("training-float32", "training-mixed_float16", "inference", "native-jax", "reference-xla-loop")
_TOY = 15.0  # expected seconds of each check in a rehearsal


def checks(device: str, data: str | None) -> Iterator[Check]:
    """All checks.

    Args:
        device: "gpu" or "cpu".
        data: Training images of `gpu_worth.py` as TASK:FOLDER.
    """
    for name, seconds in RIGHT.items():
        if device == "gpu" or name not in _GPU_ONLY:
            yield _right(name, seconds, device)
    for (contender, dtype), seconds in FAST.items():
        if device == "gpu" or (dtype == "float32" and contender not in _GPU_ONLY):
            yield _operation(contender, dtype, seconds, device)
        if (contender, dtype) == _AFTER:
            for mode, expected in MODEL.items():
                if device == "gpu" or mode not in _GPU_ONLY:
                    yield _model(mode, expected, device)
    yield _worth(device, data)


def _right(name: str, seconds: float, device: str) -> Check:
    environment = {"jax": JAX, "determinism": TENSORFLOW}.get(name, UNTUNED)
    return Check(
        "right",
        name,
        (str(HERE / "gpu_right.py"), name, device),
        _expected(seconds, device),
        needs=("jax",) if name == "jax" else ("tensorflow",),
        environment=environment,
    )


def _operation(contender: str, dtype: str, seconds: float, device: str) -> Check:
    arguments = [str(HERE / "bench_op.py"), "--device", device, "--dtype", dtype, "--contenders", contender]
    arguments += ["--repetitions", "3", "--no-memory"]
    if device == "cpu":
        arguments += ["--op", "depthwise", "--shapes", "2x3x4x16", "--no-rates"]
    else:
        arguments += ["--op", _OPERATIONS.get(contender, "depthwise,dense")]
    framework = {"native": "tensorflow", "reference": "tensorflow"}.get(contender.partition("-")[0])
    needs = "jax" if contender == "native-jax" else framework
    return Check(
        "fast",
        f"{contender}-{dtype}",
        (*arguments, "--output"),
        _expected(seconds, device),
        needs=(needs,) if needs else (),
        peer=not needs,
    )


def _model(mode: str, seconds: float, device: str) -> Check:
    toy = ["--network", "tiny", "--image-size", "32", "--batch", "2"] if device == "cpu" else []
    arguments = [str(HERE / "bench_model.py"), "--device", device, "--policy", "mixed_bfloat16", *toy]
    arguments += ["--mode", mode, "--models", "none-xla,native-xla", "--repetitions", "3", "--output"]
    return Check("fast", f"model-{mode}", tuple(arguments), _expected(seconds, device), ("tensorflow",))


def _worth(device: str, data: str | None) -> Check:
    toy = device == "cpu"
    return Check(
        "worth",
        "training",
        (str(HERE / "gpu_worth.py"), device, data or "toy"),
        _expected(60, device),
        needs=("tensorflow", "scipy", "PIL"),
        absent="" if data or toy else "no images: name a folder with --data woof:FOLDER or dogs:FOLDER",
        environment=TENSORFLOW,
        resumes=True,
    )


def _expected(seconds: float, device: str) -> float:
    return seconds if device == "gpu" else _TOY
