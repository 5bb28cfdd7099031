"""The machine: its description and its peak rates."""

import json
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

SOURCE = pathlib.Path(__file__).with_name("machine.c")


def describe() -> dict:
    """Processor, available cores, memory and system."""
    named = _first_value("/proc/cpuinfo", "model name")
    return {
        "gpu": _gpu(),
        "processor": named or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def kind() -> str:
    """The processor, and whether it has AVX-512. Runs with one thread are repeatable on one kind."""
    wide = "avx512f" in _first_value("/proc/cpuinfo", "flags").split()
    return f"{describe()['processor']}, {'with' if wide else 'without'} AVX-512"


def measure_rates(threads: int) -> dict | str:
    """Bytes copied and multiply-adds per second with `threads` threads, or why they are unknown."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "there is no C compiler (cc, gcc or clang; CC names another)"
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "machine")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        build = [compiler, *flags, str(SOURCE), "-o", program]
        try:
            for command in (build, [program, str(threads)]):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return f"{error} {error.stderr}"
        return json.loads(done.stdout)


def better(rates: dict | str, other: dict | str) -> dict | str:
    """The higher of each rate, as other load can only lower them."""
    if isinstance(rates, str):
        return other
    if isinstance(other, str):
        return rates
    return {name: max(rate, other[name]) for name, rate in rates.items()}


def _gpu() -> str:
    """The name and driver of the first GPU, or "" without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def _first_value(path: str, key: str) -> str:
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
