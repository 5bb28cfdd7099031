"""Tests of gated KerasCV backbones: they work wherever KerasCV uses a backbone."""

import keras
import numpy as np
import pytest

from keras_das.models import attach_das
from tests.models.backbones import (
    SMALL_GATE,
    assert_no_way_around_gates,
    assert_same,
    cv_resnet,
    gates,
    images,
    open_gates,
    randomize,
    weights_of,
)

keras_cv = pytest.importorskip("keras_cv")

from keras_cv.src.utils.preset_utils import save_to_preset  # noqa: E402
from keras_cv.src.utils.train import get_feature_extractor  # noqa: E402

LEVELS = ["P2", "P3", "P4", "P5"]
GATES = ["das_p2", "das_p3", "das_p4", "das_p5"]


def features(backbone, inputs):
    """Returns the feature pyramid, accessed by name as in KerasCV's detectors."""
    names = backbone.pyramid_level_inputs
    extractor = get_feature_extractor(backbone, list(names.values()), list(names))
    return {**extractor(inputs), "output": backbone(inputs)}


def detector(backbone):
    model = keras_cv.models.RetinaNet(
        backbone, num_classes=2, bounding_box_format="xyxy", feature_pyramid=None
    )
    model.compile(
        optimizer="sgd",
        box_loss=keras_cv.losses.SmoothL1Loss(l1_cutoff=1.0, reduction="none"),
        classification_loss=keras_cv.losses.FocalLoss(from_logits=True, reduction="none"),
        jit_compile=False,
    )
    return model


@pytest.mark.slow
def test_identity(rng):
    base = cv_resnet()
    randomize(base, rng)
    gated = attach_das(base)
    assert isinstance(gated, keras_cv.models.Backbone)
    assert gates(gated) == GATES
    assert gated.pyramid_level_inputs == dict(zip(LEVELS, GATES, strict=True))
    x = images(rng)
    assert_same(features(gated, x), features(base, x))


@pytest.mark.slow
def test_identity_in_a_graph(rng):
    base = cv_resnet()
    randomize(base, rng)
    gated, x = attach_das(base, **SMALL_GATE), images(rng)
    assert_same(gated.predict(x, verbose=0), base.predict(x, verbose=0))


def test_each_tap_sees_its_gate_and_those_before(rng):
    base, x = cv_resnet(), images(rng)
    randomize(base, rng)
    expected = features(base, x)
    gated = attach_das(base, **SMALL_GATE)
    assert isinstance(gated, keras_cv.models.Backbone)
    assert gated.pyramid_level_inputs == dict(zip(LEVELS, GATES, strict=True))
    taps = [gated.get_layer(name).output for name in gated.pyramid_level_inputs.values()]
    assert_no_way_around_gates([*gated.outputs, *taps])
    assert_same(features(gated, x), expected)
    for i, name in enumerate(GATES):
        gate = gated.get_layer(name)
        closed = gate.get_weights()
        open_gates([gate], rng)
        changed = {
            name
            for name, value in features(gated, x).items()
            if not np.array_equal(value.numpy(), expected[name].numpy())
        }
        assert changed == {"output", *LEVELS[i:]}
        gate.set_weights(closed)


@pytest.mark.slow
def test_classifier_trains(rng):
    base = cv_resnet()
    before = weights_of(base)
    gated = attach_das(base, **SMALL_GATE)
    classifier = keras_cv.models.ImageClassifier(gated, num_classes=3)
    classifier.compile("sgd", "sparse_categorical_crossentropy")
    start = [gated.get_layer(name).deform.get_weights() for name in GATES]
    classifier.fit(images(rng, 64, 4), np.array([0, 1, 2, 0]), epochs=2, verbose=0)
    assert_same(weights_of(base), before)
    for name, old in zip(GATES, start, strict=True):
        assert not np.array_equal(gated.get_layer(name).deform.get_weights()[0], old[0])


@pytest.mark.slow
def test_detector_trains(rng):
    gated = attach_das(cv_resnet(input_shape=(64, 64, 3)), at="P3", **SMALL_GATE)
    model = detector(gated)
    start = gated.get_layer("das_p3").get_weights()
    # The second image has no boxes.
    boxes = np.array([[[4, 4, 40, 40], [8, 30, 60, 60]], [[-1] * 4] * 2], "float32")
    classes = np.array([[0, 1], [-1, -1]], "float32")
    model.fit(images(rng), {"boxes": boxes, "classes": classes}, verbose=0)
    moved = [
        not np.array_equal(a, b) for a, b in zip(gated.get_layer("das_p3").get_weights(), start, strict=True)
    ]
    assert any(moved)


@pytest.mark.slow
def test_file(tmp_path, rng):
    gated = attach_das(cv_resnet(), **SMALL_GATE)
    randomize(gated, rng)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    assert type(loaded) is type(gated)
    x = images(rng)
    assert_same(features(loaded, x), features(gated, x))


@pytest.mark.slow
def test_classifier_file(tmp_path, rng):
    classifier = keras_cv.models.ImageClassifier(attach_das(cv_resnet(), **SMALL_GATE), num_classes=3)
    classifier.save(tmp_path / "classifier.keras")
    loaded = keras.saving.load_model(tmp_path / "classifier.keras")
    assert gates(loaded.backbone) == GATES
    x = images(rng)
    assert_same(loaded(x), classifier(x))


def test_preset(tmp_path, rng):
    folder, base_folder = str(tmp_path / "gated"), str(tmp_path / "base")
    base = cv_resnet()
    randomize(base, rng)
    save_to_preset(base, base_folder)
    gated = attach_das(keras_cv.models.ResNetBackbone.from_preset(base_folder), **SMALL_GATE)
    x = images(rng)
    assert_same(features(gated, x), features(base, x))

    randomize(gated, rng)
    save_to_preset(gated, folder)
    loaded = keras_cv.models.Backbone.from_preset(folder)
    assert type(loaded) is type(gated)
    assert_same(features(loaded, x), features(gated, x))
    classifier = keras_cv.models.ImageClassifier.from_preset(folder, num_classes=3)
    assert_same(classifier.backbone(x), gated(x))


def test_preset_in_another_shape(tmp_path):
    save_to_preset(attach_das(cv_resnet(), **SMALL_GATE), str(tmp_path))
    loaded = keras_cv.models.Backbone.from_preset(str(tmp_path), input_shape=(96, 64, 3))
    assert loaded.input.shape == (None, 96, 64, 3)


def test_tasks_are_refused():
    classifier = keras_cv.models.ImageClassifier(cv_resnet(), num_classes=3)
    with pytest.raises(ValueError, match=r"attach_das\(task.backbone\)"):
        attach_das(classifier)
