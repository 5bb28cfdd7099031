"""Tests that an example without an optional package ends with one line that names the extra to install."""

import subprocess
import sys

import pytest

from .conftest import ROOT

WITHOUT = """
import runpy, sys
sys.modules["{package}"] = None
sys.argv = ["{script}", "--help"]
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("classify", "platformdirs", "examples"),
        ("classify", "tensorboard", "examples"),
        ("detect", "pycocotools", "examples"),
        ("explore", "matplotlib", "explore"),
    ],
)
def test_missing_package(name: str, package: str, extra: str) -> None:
    code = WITHOUT.format(package=package, script=ROOT / "examples" / f"{name}.py")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == f"{name}: error: {package} not installed: pip install 'keras-das[{extra}]'\n"
