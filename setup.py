"""What pyproject.toml cannot say: how to make a platform wheel.

The environment variable KERAS_DAS_PREBUILT names a folder that `keras-das build --output FOLDER` has filled.
The wheel then carries its libraries in `keras_das/_lib` and is tagged for this platform and any Python 3.
Without the variable the wheel is pure. See `make wheel`.
"""

import os
import pathlib
import shutil

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILT = os.environ.get("KERAS_DAS_PREBUILT")


class PlatformDistribution(Distribution):
    """A distribution that is not pure, although nothing of it is compiled here."""

    def has_ext_modules(self):
        """Says so."""
        return True


class BuildWithLibrary(build_py):
    """Adds the libraries to the package."""

    def run(self):
        """Copies them, each with its record."""
        super().run()
        libraries = list(pathlib.Path(PREBUILT).glob("*/library.json"))
        if not libraries:
            raise FileNotFoundError(f"KERAS_DAS_PREBUILT must name a folder with a built library: {PREBUILT}")
        for record in libraries:
            there = pathlib.Path(self.build_lib, "keras_das", "_lib", record.parent.name)
            shutil.copytree(record.parent, there, dirs_exist_ok=True)


class AnyPython(bdist_wheel):
    """The library knows nothing of Python, only of the platform."""

    def get_tag(self):
        """Gives the wheel's tag."""
        return "py3", "none", super().get_tag()[2]


if PREBUILT:
    setup(
        distclass=PlatformDistribution,
        cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPython},
        # Apart from the pure wheel's, which takes whatever lies in its own.
        options={"build": {"build_base": "build/platform"}},
    )
else:
    setup()
