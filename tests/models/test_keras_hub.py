"""Tests of gated KerasHub backbones: they work wherever KerasHub uses a backbone."""

import pathlib

import keras
import numpy as np
import pytest

from keras_das import DASLayer
from keras_das.models import attach_das
from tests.models.backbones import (
    SMALL_GATE,
    assert_no_way_around_gates,
    assert_same,
    gates,
    hub_resnet,
    images,
    open_gates,
    randomize,
    weights_of,
)

keras_hub = pytest.importorskip("keras_hub")

DATA = pathlib.Path(__file__).parents[1] / "data"
LEVELS = ["P2", "P3", "P4", "P5"]
GATES = ["das_p2", "das_p3", "das_p4", "das_p5"]


def features(backbone, inputs):
    """Returns the output and the feature pyramid."""
    outputs = {"output": backbone.output, **backbone.pyramid_outputs}
    return keras.Model(backbone.input, outputs)(inputs)


def detector(backbone):
    pyramid = keras_hub.models.RetinaNetBackbone(backbone, min_level=3, max_level=5, use_p5=False)
    return keras_hub.models.RetinaNetObjectDetector(pyramid, num_classes=2, pre_logits_num_conv_layers=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "mixed_bfloat16"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"use_pre_activation": True}, marks=pytest.mark.slow),
    ],
)
def test_identity(arguments, rng):
    base = hub_resnet(**arguments)
    randomize(base, rng)
    gated = attach_das(base)
    assert isinstance(gated, keras_hub.models.FeaturePyramidBackbone)
    assert gates(gated) == GATES
    assert list(gated.pyramid_outputs) == LEVELS
    x = images(rng)
    assert_same(features(gated, x), features(base, x))
    assert gated.image_shape == base.image_shape
    assert gated.data_format == base.data_format
    assert gated.dtype_policy == base.dtype_policy


@pytest.mark.slow
def test_identity_in_a_graph(rng):
    base = hub_resnet()
    randomize(base, rng)
    gated, x = attach_das(base, **SMALL_GATE), images(rng)
    assert_same(gated.predict(x, verbose=0), base.predict(x, verbose=0))


def test_each_tap_sees_its_gate_and_those_before(rng):
    base, x = hub_resnet(), images(rng)
    expected = features(base, x)
    gated = attach_das(base, **SMALL_GATE)
    assert_no_way_around_gates([*gated.outputs, *gated.pyramid_outputs.values()])
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


def test_a_tap_named_by_its_layer_is_gated(rng):
    base = hub_resnet()
    tap = base.pyramid_outputs["P3"]._keras_history.operation.name
    gated = attach_das(base, at=[tap], **SMALL_GATE)
    assert gated.pyramid_outputs["P3"]._keras_history.operation.name == f"das_{tap}"
    with pytest.raises(ValueError, match=r"no layer or level named \['P6'\]"):
        attach_das(base, at="P6")


def test_channels_first():
    base = hub_resnet(data_format="channels_first", image_shape=(3, 64, 64))
    gated = attach_das(base, **SMALL_GATE)
    assert gated.get_layer("das_p2").data_format == "channels_first"
    assert gated.pyramid_outputs["P5"].shape == (None, 16, 2, 2)
    again = type(gated).from_config(gated.get_config())
    assert (again.data_format, again.image_shape) == ("channels_first", (3, 64, 64))


def test_backbone_without_taps():
    base = keras_hub.models.VGGBackbone([1] * 5, [8] * 5, image_shape=(64, 64, 3))
    gated = attach_das(base, **SMALL_GATE)
    assert isinstance(gated, keras_hub.models.Backbone)
    assert gates(gated) == GATES
    assert gated.pyramid_outputs == {}


@pytest.mark.slow
def test_classifier_trains(rng):
    base = hub_resnet()
    before = weights_of(base)
    gated = attach_das(base, **SMALL_GATE)
    classifier = keras_hub.models.ImageClassifier(gated, num_classes=3)
    # Gradients of gates near the identity are small, so the step size of the optimizer must not depend on
    # them.
    classifier.compile(
        keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    start = [gated.get_layer(name).deform.get_weights() for name in GATES]
    classifier.fit(images(rng, 64, 4) / 255, np.array([0, 1, 2, 0]), epochs=2, verbose=0)
    assert_same(weights_of(base), before)
    for name, old in zip(GATES, start, strict=True):
        assert not np.array_equal(gated.get_layer(name).deform.get_weights()[0], old[0])


@pytest.mark.slow
def test_detector_trains(rng):
    gated = attach_das(hub_resnet(image_shape=(64, 64, 3)), at="P3", **SMALL_GATE)
    model = detector(gated)
    start = gated.get_layer("das_p3").get_weights()
    # The second image has no boxes.
    boxes = np.array([[[4, 4, 40, 40], [8, 30, 60, 60]], [[-1] * 4] * 2], "float32")
    labels = np.array([[0, 1], [-1, -1]])
    model.fit(images(rng) / 255, {"boxes": boxes, "labels": labels}, verbose=0)
    moved = [
        not np.array_equal(a, b) for a, b in zip(gated.get_layer("das_p3").get_weights(), start, strict=True)
    ]
    assert any(moved)
    assert np.isfinite(model(images(rng))["bbox_regression"].numpy()).all()


def test_file(tmp_path, rng):
    gated = attach_das(hub_resnet(), **SMALL_GATE)
    randomize(gated, rng)
    gated.get_layer("conv1_conv").trainable = False
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    assert type(loaded) is type(gated)
    assert gates(loaded) == GATES
    assert [layer.trainable for layer in loaded.layers] == [layer.trainable for layer in gated.layers]
    x = images(rng)
    assert_same(features(loaded, x), features(gated, x))


@pytest.mark.slow
def test_detector_file(tmp_path, rng):
    model = detector(attach_das(hub_resnet(image_shape=(64, 64, 3)), **SMALL_GATE))
    model.save(tmp_path / "detector.keras")
    loaded = keras.saving.load_model(tmp_path / "detector.keras")
    assert gates(loaded.backbone.image_encoder) == GATES
    x = images(rng)
    assert_same(loaded(x), model(x))


def test_preset(tmp_path, rng):
    folder = str(tmp_path)
    base_folder = str(tmp_path / "base")
    base = hub_resnet()
    randomize(base, rng)
    base.save_to_preset(base_folder)
    gated = attach_das(keras_hub.models.Backbone.from_preset(base_folder), **SMALL_GATE)
    x = images(rng)
    assert_same(features(gated, x), features(base, x))

    randomize(gated, rng)
    gated.save_to_preset(folder)
    loaded = keras_hub.models.Backbone.from_preset(folder)
    assert type(loaded) is type(gated)
    assert gates(loaded) == GATES
    assert_same(features(loaded, x), features(gated, x))
    classifier = keras_hub.models.ImageClassifier.from_preset(folder, num_classes=3)
    assert_same(classifier.backbone(x), gated(x))


def test_preset_in_another_precision_and_shape(tmp_path):
    attach_das(hub_resnet(), **SMALL_GATE).save_to_preset(str(tmp_path))
    loaded = keras_hub.models.Backbone.from_preset(
        str(tmp_path), dtype="mixed_bfloat16", image_shape=(96, 64, 3)
    )
    assert loaded.input.shape == (None, 96, 64, 3)
    assert loaded.dtype_policy.name == "mixed_bfloat16"
    assert {layer.dtype_policy.name for layer in loaded.layers[1:]} == {"mixed_bfloat16"}
    assert loaded.get_layer("das_p5").deform.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.slow
def test_task_preset(tmp_path, rng):
    from keras_das.models.keras_hub import DASImageClassifier

    classifier = DASImageClassifier(attach_das(hub_resnet(), **SMALL_GATE), num_classes=3)
    classifier.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.ImageClassifier.from_preset(str(tmp_path))
    x = images(rng)
    assert_same(loaded(x), classifier(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ImageClassifier", "ResNetImageClassifier"])
def test_preset_of_any_image_classifier(name, tmp_path, rng):
    gated = attach_das(hub_resnet(), at="P5", **SMALL_GATE)
    classifier = getattr(keras_hub.models, name)(gated, num_classes=3)
    classifier.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.ImageClassifier.from_preset(str(tmp_path))
    assert type(loaded) is type(classifier)
    x = images(rng)
    assert_same(loaded(x), classifier(x))
    other = keras_hub.models.ImageClassifier.from_preset(str(tmp_path), num_classes=5)
    assert other(x).shape == (2, 5)
    assert_same(other.backbone(x), gated(x))


def test_tasks_are_refused():
    classifier = keras_hub.models.ImageClassifier(hub_resnet(), num_classes=3)
    with pytest.raises(ValueError, match=r"attach_das\(task.backbone\)"):
        attach_das(classifier)


def test_a_preset_of_version_0_1():
    """A preset saved before `norm` existed reproduces its original outputs, except for rounding."""
    expected = np.load(DATA / "expected_0_1.npz")
    backbone = keras_hub.models.Backbone.from_preset(str(DATA / "preset_0_1"))
    assert {layer.norm for layer in backbone.layers if isinstance(layer, DASLayer)} == {"channels"}
    outputs, wanted = backbone(expected["preset_images"]), expected["preset_outputs"]
    np.testing.assert_allclose(outputs, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
