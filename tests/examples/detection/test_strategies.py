"""Tests of detector training on several devices; two logical CPUs represent two GPUs."""

import json

import numpy as np
import pytest

from tests.examples import machines
from tests.examples.detection.test_detect import write_coco

SCRIPT = (
    """
import json, sys
import tensorflow as tf
from examples import detect
from examples.detection import detectors

tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
detectors._FILTERS = [64, 16, 16, 16]
detectors.RESNETS["resnet18"] = ("basic_block", [1, 1, 1, 1])
"""
    + machines.TWO_DEVICES
    + """
results = detect.train(detect.INTERFACE.parse(sys.argv[1:])[0])
print(json.dumps({name: results.get(name) for name in ("history", "images", "AP50")}))
"""
)


@pytest.mark.slow
def test_two_devices(tmp_path, rng):
    """Trains, scores and predicts on two devices. Each image of the test split is evaluated once."""
    words = ["--data", write_coco(tmp_path, rng, 14), "--backbone", "resnet18", "--attention", "das"]
    words += ["--image-size", "128", "--batch-size", "4", "--head-layers", "1", "--epochs", "1"]
    words += ["--learning-rate", "1e-4", "--progress", "none", "--strategy", "mirrored"]
    found = machines.result(machines.begin(tmp_path, SCRIPT, *words, "--output", "devices"))
    assert found["images"] == {"train": 9, "val": 2, "test": 3}
    assert np.isfinite(found["history"]["loss"]).all()
    assert 0 <= found["AP50"] <= 1
    detections = json.loads((tmp_path / "devices" / "detections.json").read_text())
    assert {entry["image_id"] for entry in detections} <= set(range(100, 114))
