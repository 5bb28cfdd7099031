"""Tests of distributed training: two logical CPUs represent two GPUs, and two processes two machines."""

import functools
import signal
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from examples.common import UserError
from examples.training import make_strategy

from . import machines
from .conftest import COLOURS, write_images

# The network has no batch norm, whose statistics would differ between replicas.
PRELUDE = """
import json, os, signal, sys
import keras, tensorflow as tf
from examples import backbones, classify, training

def network(image_size, small_stem=False):
    x = inputs = keras.Input((image_size, image_size, 3))
    for number in range(1, 5):
        x = keras.layers.Conv2D(16, 3, 2 if number < 3 else 1, "same", name=f"stage{number}_conv")(x)
        x = keras.layers.ReLU(name=f"stage{number}")(x)
    return keras.Model(inputs, x)

def run(*words):
    results = classify.train(classify.parse_arguments([*sys.argv[1:], *words])[0])
    return {name: results.get(name) for name in ("history", "confusion_matrix", "images")}

backbones.resnet18 = network
"""
DEVICES = (
    machines.TWO_DEVICES
    + """
print(json.dumps([run("--strategy", name, "--output", name) for name in ("none", "mirrored")]))
"""
)
# Kills the process at the step given by the environment to simulate a machine failure.
MACHINE = """
class Timer(training.StepTimer):
    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if len(self.seconds) == int(os.environ.get("KILL_AFTER", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

training.StepTimer = Timer
print(json.dumps(run()))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """Starts a run of three epochs with four steps each in a subprocess."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("red", "green"):
        write_images(folder / "images" / name, 20, COLOURS[name])
    words = ["--data", f"folder:{folder / 'images'}", "--backbone", "resnet18", "--image-size", "16"]
    words += ["--batch-size", "6", "--epochs", "3", "--progress", "none", "--attention", "das"]
    return lambda script, *more, **environment: machines.begin(
        folder, PRELUDE + script, *words, *more, **environment
    )


@pytest.fixture(scope="module")
def one_and_two(start: Callable[..., subprocess.Popen]) -> list[dict]:
    """The results of the run on one device and on two devices."""
    return machines.result(start(DEVICES))


def assert_same(found: dict, expected: dict) -> None:
    assert found["images"] == expected["images"]
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(found["history"][name], expected["history"][name], rtol=1e-4)
    assert np.sum(found["confusion_matrix"]) == expected["images"]["test"]  # each image once
    assert found["confusion_matrix"] == expected["confusion_matrix"]


@pytest.mark.slow
def test_two_devices_train_as_one(one_and_two: list[dict]) -> None:
    one, two = one_and_two
    assert_same(two, one)


@pytest.mark.slow
def test_two_machines_train_as_one_even_if_one_is_killed(
    start: Callable[..., subprocess.Popen], one_and_two: list[dict]
) -> None:
    start_both = functools.partial(machines.start_both, functools.partial(start, MACHINE))
    step = np.random.default_rng().integers(5, 12)  # after the first of three epochs with four steps each
    first, killed = start_both(KILL_AFTER=str(step))
    try:
        errors = killed.communicate(timeout=600)[1]
        assert killed.returncode == -signal.SIGKILL, errors
    finally:
        first.kill()  # otherwise it waits for the other process, or fails
        first.communicate()
    resume = functools.partial(start_both, "--resume", "both/backup")
    assert_same(machines.results_of_both(resume), one_and_two[0])


def test_a_batch_must_divide_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        num_replicas_in_sync = 3

    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: Three())
    with pytest.raises(UserError, match="--batch-size must be a multiple of 3, the number of devices, not 8"):
        make_strategy("mirrored", 8)
    assert isinstance(make_strategy("mirrored", 9), Three)


def test_machines_must_be_told_of_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(UserError, match="--strategy multiworker needs the machines' addresses in TF_CONFIG"):
        make_strategy("multiworker", 8)
