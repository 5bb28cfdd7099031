"""The kernel library: where it is looked up, how it is checked and loaded, and what it contains.

This module does not compile; `keras-das build` does, with `builder.py`. A framework is imported only when its
library is requested.
"""

import ctypes
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

from keras_das.kernels.targets import BrokenLibrary, LibraryUnavailable, Target, target

CACHE_VARIABLE = "KERAS_DAS_CACHE"
FILE, RECORD = "libkeras_das.so", "library.json"  # the content of a library's folder

_PREBUILT = pathlib.Path(__file__).parents[1] / "_lib"  # only in platform wheels
_LOADED = "_keras_das_library"  # attribute of the tensorflow module with the file of its ops
_log = logging.getLogger("keras_das")


def tensorflow_ops() -> Any:
    """Returns the module of TensorFlow ops (`tf.load_op_library`), which the first call loads.

    Returns:
        The module. `KerasDas>DeformableConv2D` is its function `keras_das_deformable_conv2d`.

    Raises:
        LibraryUnavailable: If there is no library. The result does not change while the process runs.
    """
    return _SLOTS["tensorflow"].get()


def jax_library() -> ctypes.CDLL:
    """Returns the library with the XLA FFI handlers for JAX, which the first call loads.

    Returns:
        The library as a `ctypes` object.

    Raises:
        LibraryUnavailable: If there is no library. The result does not change while the process runs.
    """
    return _SLOTS["jax"].get()


def why_not(framework: str) -> str:
    """Loads the library of a framework, unless it is loaded already.

    Args:
        framework: "tensorflow" or "jax".

    Returns:
        The reason why there is no library, or "" if it is loaded.
    """
    try:
        _SLOTS[framework].get()
    except LibraryUnavailable as error:
        return str(error)
    return ""


def path(framework: str) -> pathlib.Path | None:
    """Returns the file that the library of the framework was loaded from, or `None` if it is not loaded."""
    return _SLOTS[framework].path


def instruction_set(framework: str) -> str:
    """Returns the instruction set that the library of a framework uses: "avx512", "avx2" or "baseline".

    Args:
        framework: "tensorflow" or "jax".

    Returns:
        The name of the instruction set.

    Raises:
        LibraryUnavailable: If there is no library.
    """
    return _query(framework, "keras_das_instruction_set")


def cuda_architectures(framework: str) -> str:
    """Returns the architectures of the CUDA kernels in the library of a framework.

    Args:
        framework: "tensorflow" or "jax".

    Returns:
        The names of the architectures, "sm_90,compute_90", or "" if the library has CPU kernels only.

    Raises:
        LibraryUnavailable: If there is no library.
    """
    return _query(framework, "keras_das_cuda_architectures")


def cuda_problem(framework: str) -> str:
    """Returns the reason why the CUDA kernels of a framework's library cannot run on the GPU of this machine.

    Args:
        framework: "tensorflow" or "jax".

    Returns:
        CUDA's message, or "" if the kernels can run. The first answer is cached.

    Raises:
        LibraryUnavailable: If there is no library.
    """
    return _query(framework, "keras_das_cuda_problem")


def _query(framework: str, name: str) -> str:
    """Returns the string that a function of the library returns."""
    _SLOTS[framework].get()
    return _query_once(str(path(framework)), name)


@functools.cache
def _query_once(file: str, name: str) -> str:
    function = getattr(ctypes.CDLL(file), name)
    function.restype = ctypes.c_char_p
    return function().decode()


def cache_folder() -> pathlib.Path:
    """Returns the folder for built libraries: $KERAS_DAS_CACHE, or `keras_das` in the user's cache folder.

    Returns:
        The folder, which may not exist.

    Raises:
        LibraryUnavailable: If there is no home folder.
    """
    try:
        if named := os.environ.get(CACHE_VARIABLE):
            return pathlib.Path(named).expanduser().absolute()
        user = os.environ.get("XDG_CACHE_HOME", "")
        if os.path.isabs(user):  # the XDG standard ignores relative paths
            return pathlib.Path(user, "keras_das")
        return pathlib.Path.home() / ".cache" / "keras_das"
    except RuntimeError as error:
        raise LibraryUnavailable(f"{error} Set {CACHE_VARIABLE}.") from None


def find(wanted: Target) -> pathlib.Path:
    """Finds an intact library that fits, in the cache folder or in the package.

    Args:
        wanted: The library. If it has CUDA kernels, only a library with the same ones fits.

    Returns:
        The file of the library.

    Raises:
        LibraryUnavailable: If there is no library, or no intact one.
    """
    faults = []
    for root in (cache_folder(), _PREBUILT):
        try:
            if file := find_in(root, wanted):
                return file
        except BrokenLibrary as error:
            faults.append(str(error))
    if faults:
        raise BrokenLibrary("; ".join(faults))
    raise LibraryUnavailable(f'the kernel library for {wanted} is not built: run "keras-das build"')


def find_in(root: pathlib.Path, wanted: Target) -> pathlib.Path | None:
    """Finds a library in one folder. Does not open it, because opening a damaged library can end the process.

    Args:
        root: Folder for libraries.
        wanted: As in `find`.

    Returns:
        The file of the library, or `None` if there is none that fits.

    Raises:
        LibraryUnavailable: If the library is defective.
    """
    folder = root / wanted.folder_name
    try:
        folder.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BrokenLibrary(
            f"{root} cannot be read ({error.strerror}); set {CACHE_VARIABLE} to use another folder"
        ) from None
    file = folder / FILE
    try:
        record = json.loads((folder / RECORD).read_text())
        digest, ingredients, cuda = record["sha256"], record["ingredients"], tuple(record["cuda"])
        built_for = f"{ingredients['framework']} {ingredients['version']}"
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise _broken(file, f"cannot be read ({error.filename}: {error.strerror})") from None
    except (ValueError, TypeError, KeyError):  # not JSON, or not ours
        raise _broken(file, f"has an unreadable {RECORD} beside it") from None
    if found != digest:
        raise _broken(file, "is damaged (its SHA-256 is not the one recorded)")
    if ingredients != wanted.ingredients:
        raise _broken(file, f"was built for {built_for} from other sources or with other flags than {wanted}")
    return file if not wanted.cuda or cuda == wanted.cuda else None


def _broken(file: pathlib.Path, what: str) -> BrokenLibrary:
    return BrokenLibrary(f'the kernel library {file} {what}: run "keras-das build"')


class Slot:
    """A library that is looked up once, when it is first used. Thread-safe."""

    def __init__(self, describe: Callable[[], Target], load: Callable[[pathlib.Path], Any]):
        """Stores the functions that describe the library and load its file."""
        self.path: pathlib.Path | None = None
        self._describe, self._load = describe, load
        self._lock = threading.Lock()
        self._library: Any = None
        self._reason = ""

    def get(self) -> Any:
        """Returns the loaded library, or raises LibraryUnavailable."""
        with self._lock:
            if self._library is None and not self._reason:
                self._try()
        if self._reason:
            raise LibraryUnavailable(self._reason)
        return self._library

    def _try(self) -> None:
        try:
            file = find(self._describe())
            self._library, self.path = self._load(file), file
        except BrokenLibrary as error:
            self._reason = str(error)
            _log.warning("keras_das uses its reference implementation: %s", error)
        except LibraryUnavailable as error:
            self._reason = str(error)
            _log.info("keras_das uses its reference implementation: %s", error)


def load_tensorflow(file: pathlib.Path) -> Any:
    """Opens a checked library as TensorFlow ops. Opening a file twice returns the same ops."""
    import tensorflow as tf

    # Another copy of keras_das in this process may have loaded another file. Registering a kernel twice makes
    # it unusable.
    loaded = getattr(tf, _LOADED, str(file))
    if loaded != str(file):
        raise BrokenLibrary(
            f"this process has already loaded another kernel library, {loaded}; restart Python to load {file}"
        )
    try:
        ops = tf.load_op_library(str(file))
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        raise _broken(file, f"cannot be loaded ({_first_line(error)})") from error
    setattr(tf, _LOADED, str(file))
    return ops


def load_jax(file: pathlib.Path) -> ctypes.CDLL:
    """Opens a checked library with `ctypes`."""
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise _broken(file, f"cannot be loaded ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


_SLOTS = {
    "tensorflow": Slot(functools.partial(target, "tensorflow"), load_tensorflow),
    "jax": Slot(functools.partial(target, "jax"), load_jax),
}
