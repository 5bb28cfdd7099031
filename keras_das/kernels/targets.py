"""The kernel library that an installed framework requires: its sources, flags and key."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

FRAMEWORKS = ("tensorflow", "jax")
SOURCES = pathlib.Path(__file__).parents[1] / "csrc"

_FLAGS = ("-std=c++17", "-O3", "-fPIC")
_LINK_FLAGS = ("-shared", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_FFI_HEADER = "xla/ffi/api/ffi.h"
_X86_64 = ("x86_64", "AMD64")
_TITLES = {"tensorflow": "TensorFlow", "jax": "JAX"}


class LibraryUnavailable(RuntimeError):
    """This process cannot use a kernel library; the message is the reason."""


class BrokenLibrary(LibraryUnavailable):
    """A library exists but is defective. This causes a warning, unlike a missing library."""


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
        cuda: Architectures of the CUDA kernels. If there are any, `builder.py` adds their unit and flags.
    """

    framework: str
    version: str
    abi: str
    units: tuple[Unit, ...]
    flags: tuple[str, ...] = _FLAGS
    link_flags: tuple[str, ...] = _LINK_FLAGS
    platform: str = f"{platform.system()} {platform.machine()}"
    sources: pathlib.Path = SOURCES
    cuda: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For messages: "TensorFlow 2.21.0"."""
        return f"{_TITLES.get(self.framework, self.framework)} {self.version}"

    def for_gpus(self, architectures: tuple[str, ...]) -> "Target":
        """Returns the same library with CUDA kernels for these architectures."""
        return dataclasses.replace(self, cuda=architectures)

    @functools.cached_property
    def ingredients(self) -> dict[str, Any]:
        """Everything that determines whether a library fits, independent of installation paths.

        The CUDA kernels are not part of it: with or without them, it is the library for the framework.
        """
        return {
            "framework": self.framework,
            "version": self.version,
            "abi": self.abi,
            "platform": self.platform,
            "flags": _without_folders(self.flags),
            "link_flags": _without_folders(self.link_flags),
            "units": [[unit.source, *unit.flags] for unit in self.units],
            "sources": self._hash_sources(),
        }

    @functools.cached_property
    def key(self) -> str:
        """A hash of the ingredients."""
        return hashlib.sha256(json.dumps(self.ingredients, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        """The name of the folder of this library, inside a folder for libraries."""
        return f"{self.framework}-{self.version}-{self.key}"

    def _hash_sources(self) -> str:
        """A hash of all sources, also of those that this library does not need."""
        digest = hashlib.sha256()
        try:
            for path in sorted(path for path in self.sources.rglob("*") if path.suffix in (".h", ".cc")):
                content = hashlib.sha256(path.read_bytes()).digest()
                digest.update(f"{path.relative_to(self.sources)}\0".encode() + content)
        except OSError as error:
            raise BrokenLibrary(f"the source {error.filename} cannot be read ({error.strerror})") from None
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
    bindings = ("tf_ops.cc",) if xla_problem() else ("xla_ops.cc", "tf_ops.cc", "ffi.cc")
    link = tf.sysconfig.get_link_flags()  # includes libtensorflow_framework
    external = (f"-I{include}/external/{part}" for part in ("highwayhash", "farmhash_archive/src"))
    flags = (*_FLAGS, *tf.sysconfig.get_compile_flags(), *external, "-DKERAS_DAS_TENSORFLOW")
    return Target(
        framework="tensorflow",
        version=tf.__version__,
        abi=str(tf.sysconfig.CXX11_ABI_FLAG),
        units=(*map(Unit, bindings), *kernel_units()),
        flags=(*flags, *architecture_flags()),
        link_flags=(*_LINK_FLAGS, *link, "-l:libtensorflow_cc.so.2"),
    )


@functools.cache
def xla_problem() -> str:
    """Returns the reason why TensorFlow's library has no kernels for XLA programs, or "" if it has."""
    import tensorflow as tf

    if pathlib.Path(tf.sysconfig.get_include(), _FFI_HEADER).exists():
        return ""
    return (
        f"TensorFlow {tf.__version__} lacks the header {_FFI_HEADER} that the kernels require in XLA programs"
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


_TARGETS: dict[str, Callable[[], Target]] = {"tensorflow": _tensorflow_target, "jax": _jax_target}


def kernel_units() -> tuple[Unit, ...]:
    """Returns the units of every library: kernels for each instruction set, and the dispatch between them.

    Returns:
        The units to compile with `architecture_flags`.
    """
    instruction_sets: dict[str, tuple[str, ...]] = {"baseline": ()}
    if platform.machine() in _X86_64:
        instruction_sets = {"avx512": _AVX512, "avx2": _AVX2, "baseline": ()}
    kernels = (
        Unit("cpu/kernels.cc", (f"-DKERAS_DAS_ISA={isa}", *flags), isa)
        for isa, flags in instruction_sets.items()
    )
    return (*kernels, *map(Unit, ("deformable_conv2d.cc", "parallel.cc", "compatibility.cc")))


def architecture_flags() -> tuple[str, ...]:
    """Returns the flags that tell the sources which instruction sets have kernels."""
    return ("-DKERAS_DAS_X86",) if platform.machine() in _X86_64 else ()


def _without_folders(flags: tuple[str, ...]) -> list[str]:
    return [flag for flag in flags if not flag.startswith(("-I", "-L"))]
