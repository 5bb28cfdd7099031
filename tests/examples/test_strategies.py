"""Training spread over devices: two logical CPUs take the place of two GPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.common import UserError
from examples.training import make_strategy

from .conftest import ROOT

# Batch norm's statistics are each replica's own, so the network has none.
SCRIPT = """
import json, sys
import keras, tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from examples import backbones, classify

def network(image_size, small_stem=False):
    x = inputs = keras.Input((image_size, image_size, 3))
    for number in range(1, 5):
        x = keras.layers.Conv2D(8, 3, 2 if number < 3 else 1, "same", name=f"stage{number}_conv")(x)
        x = keras.layers.ReLU(name=f"stage{number}")(x)
    return keras.Model(inputs, x)

backbones.resnet18 = network
results = {}
for strategy in ("none", "mirrored"):
    words = [*sys.argv[1:], "--strategy", strategy, "--output", f"run-{strategy}"]
    found = classify.train(classify.parse_arguments(words)[0])
    results[strategy] = {name: found[name] for name in ("history", "confusion_matrix", "images")}
print(json.dumps(results))
"""


def test_two_devices_train_as_one(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    words = ["--data", f"folder:{image_folder()}", "--backbone", "resnet18", "--image-size", "16"]
    words += ["--batch-size", "8", "--epochs", "2", "--progress", "none", "--attention", "das"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout.splitlines()[-1]).values()
    assert two["images"] == one["images"]
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(two["history"][name], one["history"][name], rtol=1e-4)
    assert np.sum(two["confusion_matrix"]) == one["images"]["test"]  # each image once
    assert two["confusion_matrix"] == one["confusion_matrix"]


def test_a_batch_must_divide_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    devices = tf.config.list_logical_devices("CPU") * 3
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: devices if kind == "CPU" else [])
    with pytest.raises(UserError, match="--batch-size must be a multiple of 3, the number of devices, not 8"):
        make_strategy("mirrored", 8)
