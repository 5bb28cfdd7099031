"""`keras-das info` reports which implementation runs and why; `keras-das build` compiles the kernels."""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import sys

import keras

import keras_das
from keras_das.kernels import library, targets
from keras_das.ops import native

_PACKAGES = ("keras", "numpy", "tensorflow", "tensorflow-cpu", "jax", "torch", "keras-hub", "keras-cv")
_CANNOT_BUILD, _BUILD_FAILED = 1, 3  # argparse uses 2


def collect() -> dict[str, dict[str, str]]:
    """Collects the information that `keras-das info` prints.

    Returns:
        Sections by title, each a dict from names to values.
    """
    return {
        "Versions": _versions(),
        "Backend": _backend(),
        "Kernel library": _kernel_library(),
        "deformable_conv2d": _implementations(),
    }


def _versions() -> dict[str, str]:
    found = {"keras-das": keras_das.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _backend() -> dict[str, str]:
    backend = keras.backend.backend()
    # Keras lists devices only for these backends.
    devices = keras.distribution.list_devices() if backend in ("tensorflow", "jax") else []
    return {
        "keras backend": backend,
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": ", ".join(devices) or "none listed by Keras",
        "image data format": keras.config.image_data_format(),
        "dtype policy": keras.config.dtype_policy().name,
    }


def _implementations() -> dict[str, str]:
    shown = {"eager": "eager", "graph": "graph", "XLA": "XLA (jit_compile)"}
    reasons = {name: native.why_not(context) for context, name in shown.items()}
    return {
        f"{name}, implementation='auto'": f"reference ({reason})" if reason else "native"
        for name, reason in reasons.items()
    }


def _kernel_library() -> dict[str, str]:
    """Describes the library for the current Keras backend, or why there is none."""
    backend = keras.backend.backend()
    if backend not in targets.FRAMEWORKS:
        return {"library": f"none (there are no kernels for Keras on {backend})"}
    reason = library.why_not(backend)
    try:
        target, cache = targets.target(backend), str(library.cache_folder())
    except targets.LibraryUnavailable as error:
        return {"library": f"none ({error})"}
    if reason:
        return {"library": f"none ({reason})", "key wanted": target.key, "cache folder": cache}
    path = library.path(backend)
    return {
        "library": str(path),
        "built for": f"{target}, {target.platform}",
        "key": path.parent.name.rpartition("-")[2] if path else "",
        "instruction set": library.instruction_set(backend),
        "CUDA kernels": library.cuda_architectures(backend) or 'none ("keras-das build --cuda" adds them)',
        "cache folder": cache,
    }


def _table(sections: dict[str, dict[str, str]]) -> str:
    width = max(len(name) for rows in sections.values() for name in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, "-" * len(title), *(f"{name:<{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join(lines).rstrip()


def build(
    framework: str | None = None,
    force: bool = False,
    jobs: int | None = None,
    output: pathlib.Path | None = None,
    cuda: bool = False,
    arch: str | None = None,
) -> int:
    """Builds kernel libraries and prints progress to standard output.

    Args:
        framework: "tensorflow", "jax", or "all" for those of the two that are installed. `None` selects the
            framework that Keras uses.
        force: Whether to build even if the library exists.
        jobs: Number of files to compile in parallel. `None` selects the number of processors.
        output: Folder for libraries. `None` selects the user's cache folder.
        cuda: Whether to also build kernels for NVIDIA GPUs.
        arch: GPU architectures, for example "sm_80,sm_90". `None` selects those of this machine, or common
            ones if it has no GPU.

    Returns:
        The exit status, as documented by `keras-das build --help`.
    """
    from keras_das.kernels import builder, compilers

    framework = framework or keras.backend.backend()
    names = [framework]
    if framework == "all":
        names = [name for name in targets.FRAMEWORKS if importlib.util.find_spec(name)]
        if not names:
            problem = f"none of {', '.join(targets.FRAMEWORKS)} is installed"
            return _report_error(targets.LibraryUnavailable(problem), _CANNOT_BUILD)
    try:
        for name in names:
            if name not in targets.FRAMEWORKS:
                raise targets.LibraryUnavailable(f"there are no kernels for Keras on {name}")
            target = targets.target(name)
            if cuda:
                target = target.for_gpus(compilers.architectures(compilers.find_nvcc(), arch))
            builder.build(target, output, force, jobs, _progress)
    except (targets.LibraryUnavailable, compilers.NoCompiler) as error:
        return _report_error(error, _CANNOT_BUILD)
    except builder.BuildError as error:
        return _report_error(error, _BUILD_FAILED)
    return 0


def clean(output: pathlib.Path | None = None) -> int:
    """Removes the kernel libraries from the cache folder and prints their paths.

    Args:
        output: Folder for libraries. `None` selects the user's cache folder.

    Returns:
        The exit status.
    """
    from keras_das.kernels import builder

    try:
        builder.clean(output, _progress)
    except (targets.LibraryUnavailable, builder.BuildError) as error:
        return _report_error(error, _BUILD_FAILED)
    return 0


def _progress(line: str) -> None:
    print(line, flush=True)


def _report_error(error: Exception, status: int) -> int:
    print(f"keras-das: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keras-das", description="Deformable attention for Keras.")
    parser.add_argument("--version", action="version", version=f"keras-das {keras_das.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="show versions, devices, and which implementation runs and why")
    info.add_argument("--json", action="store_true", help="print JSON rather than a table")
    make = commands.add_parser(
        "build",
        help="compile the fused kernels for the installed framework",
        description="Compiles the fused kernels into the user's cache folder, unless they exist already.",
        epilog="Environment variables: CXX selects the compiler. CUDA_HOME is the folder of CUDA; by "
        "default, nvcc is looked up on the PATH and in the package nvidia-cuda-nvcc. "
        f"{library.CACHE_VARIABLE} is the cache folder. "
        f"Exit status: {_CANNOT_BUILD} if nothing can be built here (no compiler, no such framework), "
        f"{_BUILD_FAILED} if a build failed.",
    )
    make.add_argument(
        "--framework",
        choices=(*targets.FRAMEWORKS, "all"),
        help="framework to build for; all: every installed one (default: the backend of Keras)",
    )
    make.add_argument("--force", action="store_true", help="build even if the library exists")
    make.add_argument("--clean", action="store_true", help="remove all libraries from the folder instead")
    make.add_argument(
        "--jobs", type=_positive, metavar="N", help="number of parallel compilations (default: processors)"
    )
    make.add_argument("--cuda", action="store_true", help="also build kernels for NVIDIA GPUs; requires nvcc")
    make.add_argument(
        "--arch",
        metavar="sm_XX,...",
        help="GPU architectures (default: those of the GPUs here, or common ones without a GPU)",
    )
    make.add_argument(
        "--output", type=pathlib.Path, metavar="FOLDER", help="output folder (default: the cache)"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The command-line arguments. `None` selects those of `sys.argv`.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "build":
        if options.clean:
            return clean(options.output)
        if options.arch and not options.cuda:
            parser.error("--arch requires --cuda")
        return build(
            options.framework, options.force, options.jobs, options.output, options.cuda, options.arch
        )
    sections = collect()
    print(json.dumps(sections, indent=2) if options.json else _table(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
