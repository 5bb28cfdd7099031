"""Tests of the wheels: their contents, and the library of an installed platform wheel."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

from keras_das.kernels import library, targets
from tests.kernels.stand_in import forge

pytestmark = pytest.mark.slow
REPOSITORY = pathlib.Path(__file__).parents[1]
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "keras_das")


def run(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_wheel(folder, prebuilt=None):
    """Builds a wheel from a copy of the sources and returns its path."""
    sources = folder / "sources"
    sources.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "_lib")
    for part in PARTS:
        if (REPOSITORY / part).is_dir():
            shutil.copytree(REPOSITORY / part, sources / part, ignore=ignore)
        else:
            shutil.copy(REPOSITORY / part, sources)
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_DAS_PREBUILT"}
    if prebuilt is not None:
        environment["KERAS_DAS_PREBUILT"] = str(prebuilt)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    run([*command, str(sources)], env=environment)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def install(wheel, folder):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    run([*pip, str(folder), str(wheel)])


def run_installed(folder, code):
    """Runs Python code with the package installed in `folder` and an empty cache."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]),
        "KERAS_BACKEND": "tensorflow",
        library.CACHE_VARIABLE: str(folder / "empty"),
    }
    return run([sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=folder).split()


def test_pure_wheel_brings_the_kernels_sources(tmp_path):
    wheel = make_wheel(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    csrc = REPOSITORY / "keras_das" / "csrc"
    sources = {str(path.relative_to(REPOSITORY)) for path in csrc.rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("keras_das/csrc/")} == sources
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "keras_das").rglob("*.py")}
    assert modules <= names
    assert not any("_lib/" in name for name in names)


def test_platform_wheel_brings_a_library_that_is_found(tmp_path):
    """Uses a fake library, which passes all checks that precede loading."""
    target = targets.target("tensorflow")
    forge(target, tmp_path / "prebuilt")
    wheel = make_wheel(tmp_path, tmp_path / "prebuilt")
    assert "-py3-none-linux_" in wheel.name
    install(wheel, tmp_path / "site")
    found = run_installed(
        tmp_path / "site",
        """
        from keras_das.kernels import library, targets
        print(library.find(targets.target("tensorflow")))
        """,
    )
    assert found == [str(tmp_path / "site" / "keras_das" / "_lib" / target.folder_name / library.FILE)]


def test_platform_wheel_s_library_runs(tmp_path):
    """Uses the library built for this machine."""
    reason = library.why_not("tensorflow")
    if any(why in reason for why in ("is not built", "for Linux only")):
        pytest.skip(reason)
    assert not reason  # a broken library is a failure
    built = library.path("tensorflow").parent
    shutil.copytree(built, tmp_path / "prebuilt" / built.name)
    install(make_wheel(tmp_path, tmp_path / "prebuilt"), tmp_path / "site")
    path, equal = run_installed(
        tmp_path / "site",
        """
        import numpy as np
        from keras_das.kernels import library, targets
        from tests.ops.op_cases import Case, call, draw, expected, relative_error, split_upstream

        case = Case("", padding="same")
        tensors = draw(case, np.random.default_rng(0))
        outputs = call(split_upstream(tensors)[0], case, implementation="native")
        print(library.path("tensorflow"), relative_error(outputs, expected(case, tensors)[0]) < 1e-5)
        """,
    )
    assert path.startswith(str(tmp_path / "site" / "keras_das" / "_lib"))
    assert equal == "True"


def test_platform_wheel_without_a_library_is_an_error(tmp_path):
    (tmp_path / "prebuilt").mkdir()
    with pytest.raises(AssertionError, match="KERAS_DAS_PREBUILT must name a folder with a built library"):
        make_wheel(tmp_path, tmp_path / "prebuilt")
