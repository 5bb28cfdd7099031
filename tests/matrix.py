"""Tests a wheel with several versions of Python, TensorFlow and Keras: `make test-matrix`.

    python -m tests.matrix dist/keras_das-0.1.0-py3-none-any.whl build/matrix --cells 3.13/2.21.0/3.15.1

Each cell is an environment of its own, into which uv installs the wheel. The kernels are built once for each
version of TensorFlow, unless the wheel contains them. Pythons are those that uv finds: with pyenv, list them
in PYENV_VERSION, as in 3.11.7:3.12.1.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).parents[1]
TESTS = (
    "tests/layers",
    *(f"tests/ops/test_{name}.py" for name in ("native", "borders", "gradients")),
)
REQUIRED = ("hypothesis", "ml_dtypes", "pytest", "pytest-xdist")  # by the tests

# Trains, saves, loads, attaches, exports, and writes what the export computes for a file of images.
USE = """
import sys
import keras, keras_das, numpy as np
folder = sys.argv[1]
keras.utils.set_random_seed(0)
inputs = keras.Input((32, 32, 3))
x = keras.layers.Conv2D(8, 3, 2, padding="same")(inputs)
x = keras_das.DeformableConv2D(8, 3, padding="same", name="deformable")(x)
x = keras.layers.Conv2D(12, 3, 2, padding="same", name="last")(x)
outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
plain = keras.Model(inputs, outputs)
model = keras_das.attach_das(plain, ["deformable", "last"])
images = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype("float32")
np.testing.assert_array_equal(model(images), plain(images))
for jit in (False, True):
    model.compile(keras.optimizers.Adam(0.001), "mse", jit_compile=jit)
    history = model.fit(images, np.eye(2, dtype="float32")[[0, 1, 0, 1]], epochs=5, verbose=0).history
    assert min(history["loss"][1:]) < history["loss"][0], history
wanted = model.predict(images, verbose=0)
model.save(f"{folder}/model.keras")
loaded = keras.models.load_model(f"{folder}/model.keras")
np.testing.assert_allclose(loaded.predict(images, verbose=0), wanted, rtol=1e-5, atol=1e-6)
keras_das.export(model, f"{folder}/saved_model")
np.savez(f"{folder}/images.npz", images=images, wanted=wanted)
"""
SERVE = """
import sys
import numpy as np, tensorflow as tf
folder = sys.argv[1]
data = np.load(f"{folder}/images.npz")
loaded = tf.saved_model.load(f"{folder}/saved_model")
np.testing.assert_allclose(loaded.serve(data["images"]), data["wanted"], rtol=1e-4, atol=1e-5)
assert "keras_das" not in sys.modules
"""


class Cell(NamedTuple):
    """Versions to test together. `keras` is "" for the newest."""

    python: str
    tensorflow: str
    keras: str = ""

    @classmethod
    def parse(cls, text: str) -> Cell:
        return cls(*text.split("/"))


# TensorFlow 2.18 and 2.19 have no wheels for Python 3.13.
CELLS = tuple(
    map(
        Cell.parse,
        (
            *("3.11/2.18.1/3.9.0", "3.11/2.18.1", "3.12/2.18.1", "3.11/2.19.1", "3.12/2.19.1"),
            *("3.11/2.20.0", "3.12/2.20.0", "3.13/2.20.0", "3.11/2.21.0", "3.12/2.21.0", "3.13/2.21.0"),
        ),
    )
)


class Failed(Exception):
    """A step of a cell failed; the message names it."""


class Environment:
    """The environment of a cell, and a log of the commands that run in it."""

    def __init__(self, cell: Cell, folder: pathlib.Path, wheel: pathlib.Path) -> None:
        self.cell, self.folder, self.wheel = cell, folder / "-".join(filter(None, cell)), wheel
        self.log = self.folder / "log.txt"
        self.python = self.folder / "environment" / "bin" / "python"
        kernels, suite = folder / "kernels", folder / "suite"
        self.variables = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **{"KERAS_DAS_CACHE": str(kernels), "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
        }
        self.suite = suite

    def create(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        uv = [sys.executable, "-m", "uv"]
        environment = str(self.python.parents[1])
        self.run("environment", [*uv, "venv", "--quiet", "--python", self.cell.python, environment])
        packages = [str(self.wheel), f"tensorflow=={self.cell.tensorflow}", *REQUIRED]
        packages += [f"keras=={self.cell.keras}"] if self.cell.keras else []
        self.run("installation", [*uv, "pip", "install", "--quiet", "--python", str(self.python), *packages])

    def run(self, step: str, command: list[str]) -> str:
        """Runs a command of a step, and returns what it prints."""
        done = subprocess.run(
            command,
            cwd=self.suite,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with self.log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        if done.returncode:
            raise Failed(f"{step}: see {self.log}")
        return done.stdout


def test(environment: Environment) -> dict[str, str]:
    """Tests a cell, and returns what `keras-das info` says of the kernels and what pytest counts."""
    environment.create()
    python = str(environment.python)
    info = environment.run("info", [python, "-m", "keras_das", "info"])
    if not re.search(r"^eager\b.* native$", info, re.MULTILINE):  # the wheel does not contain the kernels
        environment.run("kernels", [python, "-m", "keras_das", "build", "--framework", "tensorflow"])
        info = environment.run("info", [python, "-m", "keras_das", "info"])
    found = {
        context: re.search(rf"^{context}\b.* (native|reference)\b", info, re.MULTILINE)[1]
        for context in ("eager", "graph", "XLA")
    }
    found["keras"] = re.search(r"^keras +(\S+)$", info, re.MULTILINE)[1]
    folder = str(environment.folder)
    environment.run("use", [python, "-c", USE, folder])
    environment.run("export", [python, "-c", SERVE, folder])
    options = ["-q", "-n", "2", "-W", "default", "-p", "no:cacheprovider", "-m", "not slow"]
    printed = environment.run("tests", [python, "-m", "pytest", *options, *TESTS])
    found["tests"] = re.search(r"(\d+ passed.*?) in ", printed)[1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path, help="for environments, kernels and logs")
    parser.add_argument(
        "--cells", type=Cell.parse, nargs="*", default=CELLS, metavar="PYTHON/TENSORFLOW/KERAS"
    )
    options = parser.parse_args()
    folder = options.folder.absolute()
    # A copy without the package, so that the tests import the installed one.
    shutil.rmtree(folder / "suite", ignore_errors=True)
    shutil.copytree(REPOSITORY / "tests", folder / "suite" / "tests")
    shutil.copy(REPOSITORY / "pyproject.toml", folder / "suite")
    rows, failed = [], 0
    for cell in options.cells:
        print(f"{cell.python}, TensorFlow {cell.tensorflow}, Keras {cell.keras or 'newest'}", flush=True)
        try:
            found = test(Environment(cell, folder, options.wheel.absolute()))
        except Failed as error:
            print(f"    failed in {error}", flush=True)
            failed += 1
            rows.append([cell.python, cell.tensorflow, cell.keras or "newest", "", "", "failed"])
            continue
        eager = found["eager"] if found["eager"] == found["graph"] else "differ"
        rows.append([cell.python, cell.tensorflow, found["keras"], eager, found["XLA"], found["tests"]])
        print(f"    {found}", flush=True)
    print("\n| Python | TensorFlow | Keras | eager, graph | XLA | fast tests |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
