"""Tests of loading saved models in a new process that imports no model library except `keras_das`."""

import collections
import copy

import keras
import numpy as np
import pytest

from keras_das.models import attach_das, registry
from tests import processes
from tests.models.backbones import SMALL_GATE, cv_resnet, hub_resnet, images, randomize


def run(code, *arguments):
    """Runs code in a process that has imported only TensorFlow and Keras."""
    result = processes.python(code, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


CHECK = """
def check(model):
    expected = np.load(folder + "/expected.npz")
    assert (model(expected["x"]).numpy() == expected["y"]).all()
    assert [layer.name for layer in model.layers if isinstance(layer, keras_das.DASLayer)] == [
        "das_p2", "das_p3", "das_p4", "das_p5"
    ]
"""


def saved(base, folder, rng):
    """Saves a gated backbone with random weights, an image, and its outputs."""
    gated = attach_das(base, **SMALL_GATE)
    randomize(gated, rng)
    gated.save(folder / "gated.keras")
    x = images(rng)
    np.savez(folder / "expected.npz", x=x, y=gated(x).numpy())
    return gated


START = """
import sys
import numpy as np, keras, {imports}
folder = sys.argv[1]
"""
FILE = """
assert not {{"keras_hub", "keras_cv"}} & set(sys.modules)
model = keras.saving.load_model(folder + "/gated.keras")
check(model)
import {library}
assert isinstance(model, {library}.models.Backbone)
"""
HUB_PRESET = """
import keras_hub
check(keras_hub.models.ImageClassifier.from_preset(folder, num_classes=3).backbone)
"""
CV_PRESET = """
import keras_cv
check(keras_cv.models.Backbone.from_preset(folder))
"""


@pytest.mark.parametrize(
    ("imports", "load"),
    [
        ("keras_das.models", HUB_PRESET),
        pytest.param("keras_das.models", FILE.format(library="keras_hub"), marks=pytest.mark.slow),
        pytest.param("keras_hub, keras_das.models", HUB_PRESET, marks=pytest.mark.slow),
    ],
    ids=["preset", "file", "preset, the library first"],
)
def test_keras_hub(imports, load, tmp_path, rng):
    saved(hub_resnet(), tmp_path, rng).save_to_preset(str(tmp_path))
    run(START.format(imports=imports) + CHECK + load, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("load", [FILE.format(library="keras_cv"), CV_PRESET], ids=["file", "preset"])
def test_keras_cv(load, tmp_path, rng):
    gated = saved(cv_resnet(), tmp_path, rng)
    from keras_cv.src.utils.preset_utils import save_to_preset

    save_to_preset(gated, str(tmp_path))
    run(START.format(imports="keras_das.models") + CHECK + load, tmp_path)


def test_the_stand_in_answers_for_the_class():
    """Uses a class of the standard library instead of a backbone."""
    registry.register_lazily("collections", "OrderedDict", library="nothing")
    try:
        stand_in = keras.saving.get_registered_object("keras_das>OrderedDict")
    finally:
        del keras.saving.get_custom_objects()["keras_das>OrderedDict"]
    assert (stand_in.__module__, stand_in.__name__) == ("collections", "OrderedDict")
    assert issubclass(stand_in, collections.OrderedDict)
    assert stand_in == collections.OrderedDict
    assert stand_in not in (dict, list)
    assert stand_in.fromkeys("a") == {"a": None}


def test_missing_library_is_named(monkeypatch):
    registry.register_lazily("keras_das.models.nothing_there", "DASNothing", library="some-library")
    try:
        with pytest.raises(ImportError, match="requires some-library: pip install some-library"):
            keras.saving.deserialize_keras_object(
                {"class_name": "DASNothing", "registered_name": "keras_das>DASNothing", "config": {}}
            )
        stand_in = keras.saving.get_registered_object("keras_das>DASNothing")
        copy.copy(stand_in)  # copying it must not import the library
        assert stand_in != "DASNothing"
    finally:
        del keras.saving.get_custom_objects()["keras_das>DASNothing"]
