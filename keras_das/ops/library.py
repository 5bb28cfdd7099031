"""The kernel library: which library a framework requires, where it is looked up, and how it is loaded.

This module does not compile; `keras-das build` does, with `builder.py`. A framework is imported only when its
library is requested.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

FRAMEWORKS = ("tensorflow", "jax")
CACHE_VARIABLE = "KERAS_DAS_CACHE"
FILE, RECORD = "libkeras_das.so", "library.json"  # the content of a library's folder
KEY_SYMBOL = "keras_das_build_key"

_PACKAGE = pathlib.Path(__file__).parents[1]
_SOURCES = _PACKAGE / "csrc"
_PREBUILT = _PACKAGE / "_lib"  # only in platform wheels

_FLAGS = ("-std=c++17", "-O3", "-fPIC")
_LINK_FLAGS = ("-shared", "-pthread")
# Precede TensorFlow's libraries, which also export a CUDA runtime. The symbols are hidden from others.
_CUDA_LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_FFI_HEADER = "xla/ffi/api/ffi.h"
_X86_64 = ("x86_64", "AMD64")

_LOADED = "_keras_das_library"  # attribute of the tensorflow module with the file of its ops
_log = logging.getLogger("keras_das")


class LibraryUnavailable(RuntimeError):
    """This process cannot use a kernel library; the message is the reason."""


class _Broken(LibraryUnavailable):
    """A library exists but is defective. This causes a warning, unlike a missing library."""


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


class Unit(NamedTuple):
    """One call of the compiler: a source file, and its flags in addition to those of the library."""

    source: str
    flags: tuple[str, ...] = ()
    variant: str = ""

    def __str__(self) -> str:
        """For progress messages: "kernels.cc (avx2)"."""
        name = pathlib.Path(self.source).name
        return f"{name} ({self.variant})" if self.variant else name


@dataclasses.dataclass(frozen=True)
class Target:
    """A library to build: its framework, sources and flags.

    Attributes:
        framework: "tensorflow" or "jax".
        version: Version of the framework.
        abi: Which of GCC's two C++ ABIs the framework uses, or "" if no C++ objects are exchanged.
        units: Units to compile, slowest first.
        flags: Compiler flags of every unit. Flags that name a folder begin with -I.
        link_flags: Linker flags of the library. Flags that name a folder begin with -L.
        platform: Operating system and architecture.
        sources: Folder of the units.
        cuda: Architectures of the CUDA kernels, set by `for_gpus`. Empty if there are none.
        without_cuda: The same library without CUDA kernels.
    """

    framework: str
    version: str
    abi: str
    units: tuple[Unit, ...]
    flags: tuple[str, ...] = _FLAGS
    link_flags: tuple[str, ...] = _LINK_FLAGS
    platform: str = f"{platform.system()} {platform.machine()}"
    sources: pathlib.Path = _SOURCES
    cuda: tuple[str, ...] = ()
    without_cuda: "Target | None" = None

    def __str__(self) -> str:
        """For messages: "TensorFlow 2.21.0"."""
        return f"{_TITLES.get(self.framework, self.framework)} {self.version}"

    def for_gpus(self, architectures: tuple[str, ...]) -> "Target":
        """Returns the same library with additional CUDA kernels for these architectures."""
        return dataclasses.replace(
            self,
            units=(Unit("deformable_conv2d.cu.cc"), *self.units),
            flags=(*self.flags, f'-DKERAS_DAS_CUDA="{",".join(architectures)}"'),
            link_flags=(*_CUDA_LINK_FLAGS, *self.link_flags),
            cuda=architectures,
            without_cuda=self,
        )

    @functools.cached_property
    def ingredients(self) -> dict[str, Any]:
        """Everything that determines whether a library fits, independent of installation paths."""
        return {
            "framework": self.framework,
            "version": self.version,
            "abi": self.abi,
            "platform": self.platform,
            "flags": _without_folders(self.flags),
            "link_flags": _without_folders(self.link_flags),
            "units": [[unit.source, *unit.flags] for unit in self.units],
            "sources": self._hash_sources(),
            "cuda": list(self.cuda),
        }

    @functools.cached_property
    def key(self) -> str:
        """A hash of the ingredients."""
        return hashlib.sha256(json.dumps(self.ingredients, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        """The name of the folder of this library, inside a folder for libraries."""
        kind = "cuda-" if self.cuda else ""
        return f"{self.framework}-{self.version}-{kind}{self.key}"

    def _hash_sources(self) -> str:
        names = {unit.source for unit in self.units} | {header.name for header in self.sources.glob("*.h")}
        digest = hashlib.sha256()
        for name in sorted(names):
            try:
                content = (self.sources / name).read_bytes()
            except OSError as error:
                raise _Broken(f"the source {error.filename} cannot be read ({error.strerror})") from None
            digest.update(f"{name}\0".encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()


def target(framework: str) -> Target:
    """Describes the library for the installed version of a framework. Imports the framework.

    Args:
        framework: "tensorflow" or "jax".

    Returns:
        The description.

    Raises:
        LibraryUnavailable: If the framework is not installed, or there are no kernels for this system.
    """
    if not sys.platform.startswith("linux"):
        raise LibraryUnavailable(f"there are kernels for Linux only, and this is {platform.system()}")
    try:
        return _TARGETS[framework]()
    except ModuleNotFoundError as error:
        raise LibraryUnavailable(f"{_TITLES[framework]} is not installed (no module {error.name})") from None


def _tensorflow_target() -> Target:
    import tensorflow as tf

    include = tf.sysconfig.get_include()
    if not pathlib.Path(include, _FFI_HEADER).exists():
        raise LibraryUnavailable(
            f"the kernels need XLA's foreign function interface, and TensorFlow {tf.__version__} comes "
            f"without its header {_FFI_HEADER} (2.21 has it)"
        )
    link = tf.sysconfig.get_link_flags()  # includes libtensorflow_framework
    external = (f"-I{include}/external/{part}" for part in ("highwayhash", "farmhash_archive/src"))
    flags = (*_FLAGS, *tf.sysconfig.get_compile_flags(), *external, "-DKERAS_DAS_TENSORFLOW")
    return Target(
        framework="tensorflow",
        version=tf.__version__,
        abi=str(tf.sysconfig.CXX11_ABI_FLAG),
        units=(Unit("xla_ops.cc"), Unit("tf_ops.cc"), Unit("ffi.cc"), *kernel_units()),
        flags=(*flags, *architecture_flags()),
        link_flags=(*_LINK_FLAGS, *link, "-l:libtensorflow_cc.so.2"),
    )


def _jax_target() -> Target:
    import jax
    import jaxlib

    return Target(
        framework="jax",
        version=jaxlib.__version__,
        abi="",
        units=(Unit("ffi.cc"), *kernel_units()),
        flags=(*_FLAGS, f"-I{jax.ffi.include_dir()}", *architecture_flags()),
    )


def kernel_units() -> tuple[Unit, ...]:
    """Returns the units of every library: kernels for each instruction set, and the dispatch between them.

    Returns:
        The units to compile with `architecture_flags`.
    """
    variants: dict[str, tuple[str, ...]] = {"baseline": ()}
    if platform.machine() in _X86_64:
        variants = {"avx512": _AVX512, "avx2": _AVX2, "baseline": ()}
    kernels = (Unit("kernels.cc", (f"-DKERAS_DAS_ISA={isa}", *flags), isa) for isa, flags in variants.items())
    return (*kernels, Unit("deformable_conv2d.cc"), Unit("parallel.cc"))


def architecture_flags() -> tuple[str, ...]:
    """Returns the flags that tell the sources which instruction sets have kernels."""
    return ("-DKERAS_DAS_X86",) if platform.machine() in _X86_64 else ()


_TITLES = {"tensorflow": "TensorFlow", "jax": "JAX"}
_TARGETS = {"tensorflow": _tensorflow_target, "jax": _jax_target}


def _without_folders(flags: tuple[str, ...]) -> list[str]:
    return [flag for flag in flags if not flag.startswith(("-I", "-L"))]


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
    """Finds an intact library that fits, in the package or in the cache folder.

    Args:
        wanted: The library. A variant with CUDA kernels is preferred.

    Returns:
        The file of the library.

    Raises:
        LibraryUnavailable: If there is no library, or no intact one.
    """
    faults = []
    for root in (_PREBUILT, cache_folder()):
        try:
            if file := find_in(root, wanted):
                return file
        except _Broken as error:
            faults.append(str(error))
    if faults:
        raise _Broken("; ".join(faults))
    raise LibraryUnavailable(f'the kernel library for {wanted} is not built: run "keras-das build"')


def find_in(root: pathlib.Path, wanted: Target) -> pathlib.Path | None:
    """Finds a library in one folder.

    Args:
        root: Folder for libraries.
        wanted: As in `find`.

    Returns:
        The file of the library, or `None` if there is none.

    Raises:
        LibraryUnavailable: If none of the libraries is intact.
    """
    faults = []
    candidates = [wanted] if wanted.cuda else [*_with_cuda(root, wanted), wanted]
    for candidate in candidates:
        folder = root / candidate.folder_name
        try:
            folder.stat()
            return check(folder, candidate)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _Broken(
                f"{root} cannot be read ({error.strerror}); {CACHE_VARIABLE} names another folder"
            ) from None
        except _Broken as error:
            faults.append(str(error))
    if faults:
        raise _Broken("; ".join(faults))
    return None


def variants(root: pathlib.Path, target: Target) -> list[pathlib.Path]:
    """Returns the folders in `root` that contain variants of a library, with or without CUDA kernels.

    Args:
        root: Folder for libraries.
        target: Any of the variants.

    Returns:
        The existing folders.
    """
    plain = target.without_cuda or target
    folders = [root / variant.folder_name for variant in (plain, *_with_cuda(root, plain))]
    return [folder for folder in folders if folder.exists()]


def _with_cuda(root: pathlib.Path, plain: Target) -> list[Target]:
    """The variants with CUDA kernels in a folder. Their records name the architectures."""
    found = []
    for record in sorted(root.glob(f"{plain.framework}-{plain.version}-cuda-*/{RECORD}")):
        try:
            variant = plain.for_gpus(tuple(json.loads(record.read_text())["ingredients"]["cuda"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # its target is unknown
        if variant.folder_name == record.parent.name:
            found.append(variant)
    return found


def check(folder: pathlib.Path, wanted: Target) -> pathlib.Path:
    """Checks a library without opening it, because opening a damaged library can end the process.

    Args:
        folder: Folder of the library.
        wanted: The target that it must have been built for.

    Returns:
        The file of the library.

    Raises:
        LibraryUnavailable: If the library is defective.
    """
    file = folder / FILE
    try:
        record = json.loads((folder / RECORD).read_text())
        content = file.read_bytes()
        key, size, digest = record["key"], record["size"], record["sha256"]
        built_for = f"{record['ingredients']['framework']} {record['ingredients']['version']}"
    except OSError as error:
        raise _broken(file, f"cannot be read ({error.filename}: {error.strerror})") from None
    except (ValueError, TypeError, KeyError):  # not JSON, or not ours
        raise _broken(file, f"has an unreadable {RECORD} beside it") from None
    if len(content) != size:
        raise _broken(file, f"has {len(content)} bytes and should have {size}")
    if hashlib.sha256(content).hexdigest() != digest:
        raise _broken(file, "is damaged (its SHA-256 is not the one recorded)")
    inside = re.search(rf"{KEY_SYMBOL}=(\w+)".encode(), content)
    keys = {key, inside[1].decode() if inside else "none"}
    if keys != {wanted.key}:
        found = " and ".join(sorted(keys))
        raise _broken(file, f"was built for {built_for}, not {wanted} (key {found}, not {wanted.key})")
    return file


def _broken(file: pathlib.Path, what: str) -> _Broken:
    return _Broken(f'the kernel library {file} {what}: run "keras-das build"')


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
        except _Broken as error:
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
        raise _Broken(f"this process has already loaded another kernel library, {loaded}, besides {file}")
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
