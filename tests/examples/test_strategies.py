"""Training spread over devices: two logical CPUs in place of two GPUs, two processes in place of machines."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from examples.common import UserError
from examples.training import make_strategy

from .conftest import ROOT

# Batch norm's statistics are each replica's own, so the network has none.
PRELUDE = """
import json, os, signal, sys
import keras, tensorflow as tf
from examples import backbones, classify, training

def network(image_size, small_stem=False):
    x = inputs = keras.Input((image_size, image_size, 3))
    for number in range(1, 5):
        x = keras.layers.Conv2D(8, 3, 2 if number < 3 else 1, "same", name=f"stage{number}_conv")(x)
        x = keras.layers.ReLU(name=f"stage{number}")(x)
    return keras.Model(inputs, x)

def run(*words):
    results = classify.train(classify.parse_arguments([*sys.argv[1:], *words])[0])
    return {name: results.get(name) for name in ("history", "confusion_matrix", "images")}

backbones.resnet18 = network
"""
DEVICES = """
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
print(json.dumps([run("--strategy", name, "--output", name) for name in ("none", "mirrored")]))
"""
MACHINE = """
class Timer(training.StepTimer):
    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if len(self.seconds) == int(os.environ.get("KILL_AFTER", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

training.StepTimer = Timer
print(json.dumps(run()))
"""


@pytest.fixture
def start(image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Starts a run of three epochs of four steps in a process of its own."""
    words = ["--data", f"folder:{image_folder()}", "--backbone", "resnet18", "--image-size", "16"]
    words += ["--batch-size", "6", "--epochs", "3", "--progress", "none", "--attention", "das"]

    def begin(script: str, *more: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, *words, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def result(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def assert_same(found: dict, expected: dict) -> None:
    assert found["images"] == expected["images"]
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(found["history"][name], expected["history"][name], rtol=1e-4)
    assert np.sum(found["confusion_matrix"]) == expected["images"]["test"]  # each image once
    assert found["confusion_matrix"] == expected["confusion_matrix"]


def test_two_devices_train_as_one(start: Callable[..., subprocess.Popen]) -> None:
    one, two = result(start(DEVICES))
    assert_same(two, one)


def test_two_machines_train_as_one_even_if_one_is_killed(start: Callable[..., subprocess.Popen]) -> None:
    alone = start(MACHINE, "--output", "alone")
    expected = result(alone)

    def start_both(*words: str, **of_second: str) -> list[subprocess.Popen]:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
        tasks = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(2)]
        shared = ("--strategy", "multiworker", "--output", "both", *words)
        first = start(MACHINE, *shared, TF_CONFIG=json.dumps(tasks[0]))
        return [first, start(MACHINE, *shared, TF_CONFIG=json.dumps(tasks[1]), **of_second)]

    step = np.random.default_rng().integers(5, 12)  # after the first of three epochs of four steps
    chief, killed = start_both(KILL_AFTER=str(step))
    try:
        errors = killed.communicate(timeout=600)[1]
        assert killed.returncode == -signal.SIGKILL, errors
    finally:
        chief.kill()  # it would wait for the other, or fail
        chief.communicate()
    chief, other = start_both("--resume", "both/backup")
    found = result(chief)
    assert result(other)["history"] is None  # one of them writes
    assert_same(found, expected)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


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
