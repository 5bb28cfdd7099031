"""Builds kernel libraries for `keras-das build`, with parallel compiler calls under a file lock."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from keras_das.kernels import library
from keras_das.kernels.compilers import Nvcc, architecture_flags, find_compiler, find_nvcc
from keras_das.kernels.targets import FRAMEWORKS, LibraryUnavailable, Target, Unit

_LOCK = "lock"
_UNFINISHED = ".unfinished-"
_LIBRARY_FOLDER = re.compile(rf"({'|'.join(FRAMEWORKS)})-.+-[0-9a-f]{{16}}")
_LAST_LINES = 20  # of a compiler's error output
# Run in a separate process: a library cannot be unloaded, and loading it can end the process.
_TRIALS = {
    "tensorflow": "import sys, tensorflow; tensorflow.load_op_library(sys.argv[1])",
    "jax": "import ctypes, sys; ctypes.CDLL(sys.argv[1])",
}

_CUDA_UNIT = Unit("cuda/kernels.cu.cc")
# Precede TensorFlow's libraries, which also export a CUDA runtime. The symbols are hidden from others.
_CUDA_LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL")

_LAUNCHERS = ("ccache", "distcc", "sccache")  # in $CXX, before the compiler

Report = Callable[[str], None]


class BuildError(RuntimeError):
    """A build has failed; the message says why."""


def build(
    target: Target,
    root: pathlib.Path | None = None,
    force: bool = False,
    jobs: int | None = None,
    report: Report = print,
) -> pathlib.Path:
    """Builds a library unless an intact one exists.

    The library is built in a temporary folder, which is renamed once the library is complete and loads. Other
    processes never see an incomplete library. If two processes build at once, the second waits for the first.
    A framework has one library. If `target` has CUDA kernels that this library lacks, it is built again with
    them. Without `force`, a library with CUDA kernels is also accepted for a target without.

    Args:
        target: The library to build.
        root: Folder for libraries. `None` selects the user's cache folder.
        force: Whether to build even if the library exists.
        jobs: Number of units to compile in parallel. `None` selects the number of processors.
        report: Function that is called with each line of progress.

    Returns:
        The file of the library.

    Raises:
        NoCompiler: If there is no compiler.
        BuildError: If compiling, linking or loading fails, or a folder cannot be written.
        LibraryUnavailable: If the sources are missing, or there is no home folder for the cache.
    """
    if not force and (file := _present(target, root)):
        report(f"The kernel library for {target} is built: {file.absolute()}")
        return file
    root = library.cache_folder() if root is None else root.absolute()
    compiler = find_compiler()
    nvcc = find_nvcc() if target.cuda else None
    try:
        with _locked(root, report) as waited:
            if (waited or not force) and (file := _present(target, root)):
                report(f"Another process has built the kernel library for {target}: {file}")
                return file
            return _build(target, root / target.folder_name, compiler, nvcc, jobs or _processors(), report)
    except OSError as error:
        raise BuildError(
            f"{error.filename or root} cannot be written ({error.strerror}); "
            f"set {library.CACHE_VARIABLE} to use another folder than {root}"
        ) from error


def clean(root: pathlib.Path | None = None, report: Report = print) -> None:
    """Removes all kernel libraries from a folder, and the folder if it is empty then.

    Args:
        root: The folder. `None` selects the user's cache folder.
        report: Function that is called with a line for each removed library.

    Raises:
        BuildError: If something cannot be removed.
        LibraryUnavailable: If there is no home folder for the cache.
    """
    root = library.cache_folder() if root is None else root
    try:
        if not root.is_dir():
            report(f"Nothing to remove: there is no {root}")
            return
        with _locked(root, report):
            folders = [f for f in sorted(root.iterdir()) if _LIBRARY_FOLDER.fullmatch(f.name)]
            for folder in folders:
                shutil.rmtree(folder)
                report(f"Removed {folder}")
            _remove_unfinished(root)
        _remove_if_empty(root)
        if not folders:
            report(f"Nothing to remove: no kernel library in {root}")
    except OSError as error:
        raise BuildError(f"{error.filename or root} cannot be removed ({error.strerror})") from error


def _present(target: Target, root: pathlib.Path | None) -> pathlib.Path | None:
    """Returns the file of the library if it exists and is intact."""
    try:
        return library.find(target) if root is None else library.find_in(root, target)
    except LibraryUnavailable:
        return None


def _processors() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _locked(root: pathlib.Path, report: Report) -> Iterator[bool]:
    """Holds the lock of a folder, which a dying process releases too. Yields whether it had to wait.

    Creates the folder if it does not exist or the previous holder has removed it.
    """
    import fcntl  # Windows, where there are no kernels, does not have it

    waited = False
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock = (root / _LOCK).open("a")
        except FileNotFoundError:
            continue  # the previous holder has removed the folder
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                report(f"Waiting for another process that uses {root}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_file(root / _LOCK, lock.fileno()):
                continue  # the previous holder has removed the file, and another process may hold a new one
            try:
                yield waited
            finally:
                (root / _LOCK).unlink()
            return


def _is_file(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_empty(folder: pathlib.Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        # It contains other files, such as the lock of a waiting process, or another process has removed it.
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def _remove_unfinished(root: pathlib.Path) -> None:
    """Removes the remains of killed processes. The caller holds the lock."""
    for folder in root.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder)


def _build(
    target: Target,
    folder: pathlib.Path,
    compiler: list[str],
    nvcc: Nvcc | None,
    jobs: int,
    report: Report,
) -> pathlib.Path:
    root = folder.parent
    _remove_unfinished(root)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=root) as aside:
        objects, made = pathlib.Path(aside, "objects"), pathlib.Path(aside, target.folder_name)
        objects.mkdir()
        made.mkdir()
        report(f"Building the kernel library for {target} with {shlex.join(compiler)}, {jobs} units at once")
        if nvcc:
            report(f"CUDA kernels for {', '.join(target.cuda)} with {nvcc.command}")
        compiled = _compile_all(target, compiler, nvcc, objects, jobs, report)
        if dataclasses.replace(target).key != target.key:
            raise BuildError(f"the sources in {target.sources} changed while they were compiled: build again")
        file = made / library.FILE
        cuda_flags = [f"-L{nvcc.libraries}", *_CUDA_LINK_FLAGS] if nvcc else []
        _run([*compiler, *map(str, compiled), "-o", str(file), *cuda_flags, *target.link_flags], "linking")
        if nvcc:
            _check_runtime(file)
        _write_record(target, compiler, file)
        _run([sys.executable, "-c", _TRIALS[target.framework], str(file)], "loading the library")
        if folder.exists():
            folder.rename(pathlib.Path(aside, "replaced"))
        made.rename(folder)
    size = (folder / library.FILE).stat().st_size
    report(f"Built in {time.monotonic() - start:.0f} s: {folder / library.FILE} ({size / 2**20:.1f} MiB)")
    return folder / library.FILE


def _check_runtime(file: pathlib.Path) -> None:
    """Checks that the library contains its own CUDA runtime.

    TensorFlow exports another one. Kernels registered with that one would never be found.
    """
    symbols = _run(["nm", "-D", "--undefined-only", str(file)], "listing the library's symbols")
    if missing := re.findall(r" U ((?:__)?cuda\w+)", symbols):
        raise BuildError(
            f"linking failed: the library lacks a CUDA runtime of its own ({', '.join(missing)})"
        )


def _nvcc_command(target: Target, compiler: list[str], nvcc: Nvcc) -> list[str]:
    """The command of the CUDA unit, without the framework's headers, which include another CUDA version."""
    definitions = [flag for flag in target.flags if flag.startswith("-D")]
    program, *flags = compiler[1:] if pathlib.Path(compiler[0]).name in _LAUNCHERS else compiler
    host = [f"-ccbin={program}", *(f"-Xcompiler={flag}" for flag in ("-fPIC", *flags))]
    architectures = architecture_flags(target.cuda)
    return [nvcc.command, "-x", "cu", "-std=c++17", "-O3", *host, *definitions, *architectures]


def _compile_all(
    target: Target, compiler: list[str], nvcc: Nvcc | None, objects: pathlib.Path, jobs: int, report: Report
) -> list[pathlib.Path]:
    """Compiles the units. The first failure stops the others."""
    units = [_CUDA_UNIT, *target.units] if nvcc else target.units
    defined = [f'-DKERAS_DAS_CUDA="{",".join(target.cuda)}"'] if nvcc else []
    stop = threading.Event()

    def compile_one(number: int) -> tuple[int, float]:
        unit, start = units[number], time.monotonic()
        command = [*compiler, *target.flags]
        if nvcc and unit == _CUDA_UNIT:
            command = _nvcc_command(target, compiler, nvcc)
        command += [f"-I{target.sources}", *defined, *unit.flags, "-c", str(target.sources / unit.source)]
        _run([*command, "-o", str(objects / f"{number}.o")], f"compiling {unit}", stop)
        return number, time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(compile_one, number) for number in range(len(units))]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                number, seconds = future.result()
                report(f"[{done}/{len(units)}] {units[number]}: {seconds:.1f} s")
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [objects / f"{number}.o" for number in range(len(units))]


def _run(command: list[str], purpose: str, stop: threading.Event | None = None) -> str:
    """Runs a command until it ends or `stop` is set, and returns its output.

    Raises:
        BuildError: If it fails; the message ends with the output.
    """
    stop = stop or threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise BuildError(f"{purpose} failed: {command[0]} does not run ({error.strerror})") from error
        while not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
                break
        else:
            process.terminate()
            process.wait()
        output.seek(0)
        printed = output.read()
        if process.returncode:
            lines = printed.strip().splitlines()[-_LAST_LINES:]
            raise BuildError("\n".join([f"{purpose} failed (exit status {process.returncode}):", *lines]))
        return printed


def _write_record(target: Target, compiler: list[str], file: pathlib.Path) -> None:
    record = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "ingredients": target.ingredients,
        "cuda": target.cuda,
        "compiler": _version(compiler),
    }
    (file.parent / library.RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _version(compiler: list[str]) -> str:
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.partition("\n")[0]
