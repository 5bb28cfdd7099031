"""`keras-das info`: what is installed, and which implementation runs where."""

import argparse
import importlib.metadata
import json
import platform
import sys

import keras

import keras_das
from keras_das.ops import native

_PACKAGES = ("keras", "numpy", "tensorflow", "tensorflow-cpu", "jax", "torch", "keras-hub", "keras-cv")


def collect() -> dict[str, dict[str, str]]:
    """Gathers what `keras-das info` prints.

    Returns:
        Sections by title, each a mapping from a name to what was found.
    """
    return {"Versions": _versions(), "Backend": _backend(), "deformable_conv2d": _implementations()}


def _versions() -> dict[str, str]:
    found = {"keras-das": keras_das.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _backend() -> dict[str, str]:
    devices = keras.distribution.list_devices()
    return {
        "keras backend": keras.backend.backend(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": ", ".join(devices) or "none that Keras names",
        "image data format": keras.config.image_data_format(),
        "dtype policy": keras.config.dtype_policy().name,
    }


def _implementations() -> dict[str, str]:
    reason = native.why_not()
    auto = "native" if not reason else f"reference ({reason})"
    return {f"{context}, implementation='auto'": auto for context in ("eager", "graph", "XLA (jit_compile)")}


def _table(sections: dict[str, dict[str, str]]) -> str:
    width = max(len(name) for rows in sections.values() for name in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, "-" * len(title), *(f"{name:<{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join(lines).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows the program's name; `None` takes `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="keras-das", description="Deformable attention for Keras.")
    parser.add_argument("--version", action="version", version=f"keras-das {keras_das.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, and which implementation runs where and why")
    info.add_argument("--json", action="store_true", help="print JSON rather than a table")
    options = parser.parse_args(arguments)
    sections = collect()
    print(json.dumps(sections, indent=2) if options.json else _table(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
