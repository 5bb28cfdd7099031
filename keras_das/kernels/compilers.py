"""Compilers of the kernel libraries: the C++ compiler, and the CUDA compiler with its GPU architectures."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from typing import NamedTuple

_COMPILERS = ("g++", "c++", "clang++")
# The default architectures if there is no GPU and the user names none. The compiler must support them.
_COMMON = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
_RUNTIME = "libcudart_static.a"


class NoCompiler(RuntimeError):
    """A compiler is missing or does not support the requested architectures."""


def find_compiler() -> list[str]:
    """Finds the C++ compiler: $CXX if it is set, otherwise the first of g++, c++ and clang++ that exists.

    Returns:
        The first words of its command line.

    Raises:
        NoCompiler: If no compiler is found.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise NoCompiler(f"no C++ compiler: the variable CXX names {named[0]}, which is not found")
        return named
    for name in _COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise NoCompiler(
        f"no C++ compiler: none of {', '.join(_COMPILERS)} is found (Debian, Ubuntu: apt install g++), "
        "and the variable CXX is not set"
    )


class Nvcc(NamedTuple):
    """A CUDA compiler.

    Attributes:
        command: Path of the program.
        libraries: Folder of the CUDA runtime.
        known: Architectures that it supports: ("sm_75", ..., "compute_75", ...).
    """

    command: str
    libraries: pathlib.Path
    known: frozenset[str]


def find_nvcc() -> Nvcc:
    """Finds nvcc in $CUDA_HOME, on the PATH or in the package nvidia-cuda-nvcc, in this order.

    Returns:
        The compiler with its CUDA runtime.

    Raises:
        NoCompiler: If no working compiler is found, or it has no CUDA runtime.
    """
    command = _nvcc_command()
    top = pathlib.Path(command).resolve().parents[1]
    # The program on the PATH may be a script that starts the compiler; the compiler reports its own path.
    for line in _ask(command, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull).splitlines():
        if line.startswith("#$ TOP="):
            top = pathlib.Path(line.removeprefix("#$ TOP=")).resolve()
    folders = [top / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    for folder in folders:
        if (folder / _RUNTIME).exists():
            known = {*_ask(command, "--list-gpu-code").split(), *_ask(command, "--list-gpu-arch").split()}
            return Nvcc(command, folder, frozenset(known))
    raise NoCompiler(
        f"no CUDA runtime: {_RUNTIME} is in none of {', '.join(map(str, folders))} "
        "(its package is nvidia-cuda-runtime)"
    )


def _nvcc_command() -> str:
    if home := os.environ.get("CUDA_HOME"):
        command = os.path.join(home, "bin", "nvcc")
        if shutil.which(command) is None:
            raise NoCompiler(f"no CUDA compiler: the variable CUDA_HOME names {home}, which has no bin/nvcc")
        return command
    if found := shutil.which("nvcc"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for program in sorted(pathlib.Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return str(program)
    raise NoCompiler(
        "no CUDA compiler: nvcc is not on the PATH, the variable CUDA_HOME is not set, and the package "
        "nvidia-cuda-nvcc (13 or newer, with nvidia-cuda-runtime and nvidia-cuda-cccl) is not installed"
    )


def _ask(command: str, *arguments: str) -> str:
    """Returns the output of the compiler."""
    try:
        result = subprocess.run(
            [command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise NoCompiler(f"no CUDA compiler: {command} does not run ({error.strerror})") from None
    if result.returncode:
        raise NoCompiler(f"no CUDA compiler: {command} {arguments[0]} failed: {result.stdout.strip()}")
    return result.stdout


def architectures(nvcc: Nvcc, asked: str | None) -> tuple[str, ...]:
    """Chooses the architectures to compile CUDA kernels for.

    Args:
        nvcc: The compiler.
        asked: Architectures in nvcc's notation, separated by commas: "sm_90", or "compute_90" for code that
            newer GPUs translate. `None` selects the architectures of the GPUs in this machine. Without a GPU,
            it selects the common architectures that the compiler supports (nvcc 13 starts at sm_75), and the
            newest of them also as "compute_...".

    Returns:
        The names of the architectures.

    Raises:
        NoCompiler: If the compiler does not support a requested or detected architecture.
    """
    wanted = tuple(asked.split(",")) if asked is not None else _of_this_machine()
    if unknown := [name for name in wanted if name not in nvcc.known]:
        names = ", ".join(sorted(nvcc.known, key=_order))
        where = (
            f"`--arch` must name architectures that {nvcc.command} compiles for"
            if asked
            else "this GPU is not known"
        )
        raise NoCompiler(f"{where}: {names}. Received: {', '.join(unknown)}")
    if wanted:
        return wanted
    common = [name for name in _COMMON if name in nvcc.known]
    return *common, *(name.replace("sm", "compute") for name in common[-1:])


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("_")
    return kind, int(re.sub(r"\D", "", number))


def _of_this_machine() -> tuple[str, ...]:
    """The architectures of the NVIDIA GPUs that are visible to this process."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ()
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"^(\d+)\.(\d)$", result.stdout, re.MULTILINE) if result.returncode == 0 else []
    return tuple(sorted({f"sm_{major}{minor}" for major, minor in found}, key=_order))


def architecture_flags(names: tuple[str, ...]) -> list[str]:
    """Returns nvcc's flags for these architectures."""
    flags = []
    for name in names:
        flags += ["-gencode", f"arch={name.replace('sm', 'compute')},code={name}"]
    return flags
