"""Tests of detector training with two processes that represent two machines."""

import functools

import numpy as np
import pytest

from tests.examples import machines
from tests.examples.detection.test_detect import write_coco

# A narrow network with batch norm. Its statistics are local to each replica, whether a device or a machine.
PRELUDE = """
import json, sys
import tensorflow as tf
from examples import detect
from examples.detection import detectors

detectors._FILTERS = [64, 16, 16, 16]
detectors.RESNETS["resnet18"] = ("basic_block", [1, 1, 1, 1])

def run(*words):
    results = detect.train(detect.INTERFACE.parse([*sys.argv[1:], *words])[0])
    return {name: results.get(name) for name in ("history", "images", "AP50")}
"""
DEVICES = PRELUDE + machines.TWO_DEVICES + 'print(json.dumps(run("--strategy", "mirrored")))'
MACHINE = PRELUDE + "print(json.dumps(run()))"


@pytest.mark.slow
def test_two_machines_train_as_two_devices(tmp_path, rng):
    words = ["--data", write_coco(tmp_path, rng, 14), "--backbone", "resnet18", "--attention", "das"]
    words += ["--image-size", "128", "--batch-size", "4", "--head-layers", "1", "--epochs", "1"]
    words += ["--learning-rate", "1e-4", "--progress", "none"]
    expected = machines.result(machines.begin(tmp_path, DEVICES, *words, "--output", "devices"))
    start = functools.partial(machines.begin, tmp_path, MACHINE, *words)
    found = machines.results_of_both(functools.partial(machines.start_both, start))
    assert found["images"] == expected["images"]
    for name in ("loss", "bbox_regression_loss", "cls_logits_loss"):
        np.testing.assert_allclose(found["history"][name], expected["history"][name], rtol=1e-4)
    assert found["AP50"] == pytest.approx(expected["AP50"], abs=1e-3)
