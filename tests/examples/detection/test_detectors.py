"""Tests of the RetinaNets of both libraries: effects of gates, initial state, decoding, and export."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from examples import backbones
from examples.common import UserError
from examples.detection import detectors

SIZE = 128
GATES = functools.partial(backbones.attach_gates, identity_init=True, das={})
# KerasCV causes this warning.
pytestmark = pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer 'retina_net'")


@pytest.fixture(autouse=True, scope="module")
def small():
    """Narrow ResNets, because the number of weights determines the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "_FILTERS", [64, 16, 16, 16])
        patch.setitem(detectors.RESNETS, "resnet18", ("basic_block", [1, 1, 1, 1]))
        yield


@pytest.fixture(scope="module", params=[pytest.param("keras_cv", marks=pytest.mark.slow), "keras_hub"])
def plain(request, small):
    """A detector without gates."""
    return build(request.param)


@pytest.fixture(scope="module")
def gated(plain):
    """A detector with gates that start at 1, from the same library and with the same weights."""
    detector = build(plain.library, GATES)
    of_gates = {id(weight) for gate in gates_of(detector) for weight in gate.weights}
    rest = [weight for weight in detector.model.weights if id(weight) not in of_gates]
    assert [weight.shape for weight in rest] == [weight.shape for weight in plain.model.weights]
    for old, new in zip(plain.model.weights, rest, strict=True):
        new.assign(old)
    return detector


def gates_of(detector):
    layers = detector.model._flatten_layers()
    return sorted((of for of in layers if isinstance(of, keras_das.DASLayer)), key=lambda gate: gate.name)


def build(library, attach=None, **options):
    keras.utils.set_random_seed(3)
    return detectors.build(library, "resnet18", SIZE, 3, attach, **options)


def raw(detector, images):
    pixels = detector.preprocess(tf.constant(images))
    inputs = {"images": pixels} if detector.library == "keras_cv" else pixels
    return {name: value.numpy() for name, value in detector.model(inputs, training=False).items()}


@pytest.fixture
def images(rng):
    return rng.uniform(0, 255, size=(2, SIZE, SIZE, 3)).astype("float32")


def test_gates_of_the_pyramid(plain, gated, images):
    """The gates do not change the predictions initially. Afterwards, each gate from P3 to P5 affects them."""
    assert [gate.name for gate in gates_of(gated)] == ["das_p2", "das_p3", "das_p4", "das_p5"]
    before = raw(gated, images)
    for name, value in raw(plain, images).items():
        np.testing.assert_array_equal(before[name], value)
    for gate in gates_of(gated)[1:]:
        beta = gate.layer_norm.beta
        beta.assign(tf.fill(beta.shape, 2.0))
        after = raw(gated, images)
        beta.assign(tf.zeros(beta.shape))
        assert all(np.any(after[key] != before[key]) for key in before), gate.name


def test_all_scores_start_near_the_prior(plain, images):
    outputs = raw(plain, images)
    scores = tf.sigmoid(outputs["classification" if plain.library == "keras_cv" else "cls_logits"]).numpy()
    assert np.median(scores) == pytest.approx(detectors.PRIOR, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "rate", "steps"),
    [("keras_cv", 2e-3, 60), ("keras_hub", 1e-3, 80)],
    ids=["keras_cv", "keras_hub"],
)
def test_training_finds_the_box_with_and_without_keras(library, rate, steps, tmp_path):
    """Trains on an image without boxes and one with a box. The predictor and its export must find the box."""
    rng = np.random.default_rng(3)  # always the same, because so short a training does not always succeed
    detector = build(library, GATES, **({"head_layers": 1} if library == "keras_hub" else {}))
    for layer in detector.model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5  # so that few steps suffice for its averages
    images = rng.uniform(0, 60, size=(2, SIZE, SIZE, 3)).astype("float32")
    images[0, 32:96, 16:80] = 250
    boxes = np.full((2, 2, 4), -1, "float32")
    boxes[0, 0] = [16, 32, 80, 96]
    classes = np.full((2, 2), -1, "float32")
    classes[0, 0] = 2
    rate = keras.optimizers.schedules.CosineDecay(rate, steps)  # no jumps in the last steps
    detectors.compile_model(detector, keras.optimizers.Adam(rate))
    data = tf.data.Dataset.from_tensors((images, {"boxes": boxes, "classes": classes}))
    history = detector.model.fit(
        detector.batches(data.repeat(10)), epochs=steps // 10, shuffle=False, verbose=0
    ).history
    assert history["loss"][-1] < 0.2 * history["loss"][0]
    assert np.isfinite(history["loss"]).all()
    predictor = detector.predictor(SIZE)
    found = predictor.predict_on_batch(images)
    assert found["count"].shape == (2,)
    assert found["count"][0] >= 1
    best = found["boxes"][0, 0]
    assert int(found["classes"][0, 0]) == 2
    np.testing.assert_allclose(best, [16, 32, 80, 96], atol=12)

    keras_das.export(predictor, tmp_path / "detector")
    loaded = tf.saved_model.load(tmp_path / "detector")
    served = loaded.serve(images)
    assert served.keys() == found.keys()
    np.testing.assert_array_equal(served["count"], found["count"])
    np.testing.assert_allclose(served["scores"], found["scores"], rtol=1e-4, atol=1e-5)


def test_the_predictor_goes_from_pixels_to_boxes(plain, images):
    found = plain.predictor(SIZE)(images)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "boxes": (2, 100, 4),
        "scores": (2, 100),
        "classes": (2, 100),
        "count": (2,),
    }
    np.testing.assert_array_equal(found["count"], 0)  # no score exceeds the prior yet


@pytest.mark.parametrize("gated", [False, True])
def test_backbone_of_a_trained_classifier(tmp_path, gated):
    backbone = detectors._backbone("keras_hub", "resnet18", SIZE, False).model
    features = keras_das.attach_das(backbone) if gated else backbone
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.GlobalAveragePooling2D()(features(inputs))
    keras.Model(inputs, keras.layers.Dense(2)(x)).save(tmp_path / "classifier.keras")
    detector = build("keras_hub", weights=str(tmp_path / "classifier.keras"))
    theirs = {w.path.split("/", 1)[-1]: w.numpy() for w in backbone.weights}
    found = {w.path.split("/", 1)[-1]: w.numpy() for w in detector.model.backbone.image_encoder.weights}
    assert all(np.array_equal(found[path], value) for path, value in theirs.items())
    with pytest.raises(UserError, match=r"--weights: .*nowhere.keras does not fit the backbone"):
        build("keras_hub", weights="nowhere.keras")


def test_suppression_is_class_by_class():
    boxes = np.array([[[0, 0, 40, 20], [2, 0, 42, 20], [2, 0, 42, 20], [50, 60, 90, 70]]], "float32")
    logits = np.array([[[3, -9], [2, -9], [-9, 1], [-4, -9]]], "float32")  # the last score is too low
    found = detectors.Suppression()(boxes, logits)
    assert found["num_detections"].numpy().tolist() == [2]
    np.testing.assert_array_equal(found["boxes"][0, :2], [[0, 0, 40, 20], [2, 0, 42, 20]])
    np.testing.assert_array_equal(found["classes"][0, :2], [0, 1])
    np.testing.assert_allclose(found["confidence"][0, :2], 1 / (1 + np.exp([-3.0, -1.0])), rtol=1e-6)


def test_errors():
    with pytest.raises(UserError, match="--library must be one of keras_cv, keras_hub"):
        build("torchvision")
    with pytest.raises(UserError, match="--weights preset requires a preset"):
        build("keras_hub", weights="preset")
    with pytest.raises(UserError, match="--head-layers requires --library keras_hub"):
        build("keras_cv", head_layers=2)
    with pytest.raises(UserError, match="cannot load backbone keras_hub:/no/such"):
        detectors.build("keras_hub", "/no/such", SIZE, 2)
    with pytest.raises(UserError, match=r"cannot attach gates to .* --das reduction=-1: .*reduction"):
        build("keras_hub", functools.partial(GATES, das={"reduction": -1}))
    assert backbones.LIBRARIES == ("keras_cv", "keras_hub")
