"""Saved models in a fresh process, where of the libraries of models only `keras_das` has been imported."""

import copy
import textwrap

import keras
import numpy as np
import pytest

from keras_das.models import attach_das, registry
from tests import processes
from tests.models.backbones import SMALL_GATE, cv_resnet, hub_resnet, images, randomize


def run(code, *arguments):
    """Runs code where only TensorFlow and Keras have been imported."""
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
    """A gated backbone with weights of its own in a file, and what it makes of an image."""
    gated = attach_das(base, **SMALL_GATE)
    randomize(gated, rng)
    gated.save(folder / "gated.keras")
    x = images(rng)
    np.savez(folder / "expected.npz", x=x, y=gated(x).numpy())
    return gated


def test_keras_hub(tmp_path, rng):
    saved(hub_resnet(), tmp_path, rng).save_to_preset(str(tmp_path))
    start = """
        import sys
        import numpy as np, keras, {imports}
        folder = sys.argv[1]
    """
    preset = """
        import keras_hub
        check(keras_hub.models.ImageClassifier.from_preset(folder, num_classes=3).backbone)
    """
    file = """
        assert not {"keras_hub", "keras_cv"} & set(sys.modules)
        model = keras.saving.load_model(folder + "/gated.keras")
        check(model)
        import keras_hub
        assert isinstance(model, keras_hub.models.FeaturePyramidBackbone)
    """
    start, preset, file = map(textwrap.dedent, (start, preset, file))
    run(start.format(imports="keras_das.models") + CHECK + file, tmp_path)
    run(start.format(imports="keras_das.models") + CHECK + preset, tmp_path)
    run(start.format(imports="keras_hub, keras_das.models") + CHECK + preset, tmp_path)


def test_keras_cv(tmp_path, rng):
    gated = saved(cv_resnet(), tmp_path, rng)
    from keras_cv.src.utils.preset_utils import save_to_preset

    save_to_preset(gated, str(tmp_path))
    start = """
        import sys
        import numpy as np, keras, keras_das.models
        folder = sys.argv[1]
    """
    preset = """
        import keras_cv
        check(keras_cv.models.Backbone.from_preset(folder))
    """
    file = """
        assert not {"keras_hub", "keras_cv"} & set(sys.modules)
        model = keras.saving.load_model(folder + "/gated.keras")
        check(model)
        import keras_cv
        assert isinstance(model, keras_cv.models.Backbone)
    """
    start, preset, file = map(textwrap.dedent, (start, preset, file))
    run(start + CHECK + file, tmp_path)
    run(start + CHECK + preset, tmp_path)


def test_missing_library_is_named(monkeypatch):
    registry.register_lazily("keras_das.models.nothing_there", "DASNothing", library="some-library")
    try:
        with pytest.raises(ImportError, match="needs some-library: pip install some-library"):
            keras.saving.deserialize_keras_object(
                {"class_name": "DASNothing", "registered_name": "keras_das>DASNothing", "config": {}}
            )
        stand_in = keras.saving.get_registered_object("keras_das>DASNothing")
        copy.copy(stand_in)  # as any dictionary's value may be, without an import
        assert stand_in != "DASNothing"
    finally:
        del keras.saving.get_custom_objects()["keras_das>DASNothing"]
