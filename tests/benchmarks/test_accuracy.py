"""Tests of the comparison of attention modules: resuming, tasks, statistics, and variants."""

import accuracy
import accuracy_gates
import accuracy_report
import accuracy_tasks
import accuracy_training
import accuracy_variants
import clutter
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RECORD", tmp_path / "accuracy.jsonl")
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    return accuracy.RECORD


def test_what_is_in_the_record_is_not_run_again(record, monkeypatch, capsys):
    started = []

    def start(key, arguments):
        started.append(key)
        task, variant, seed = key
        line = {"task": task, "variant": variant, "seed": seed, "test_accuracy": 0.5}
        return None if variant == "SE" else line

    monkeypatch.setattr(accuracy, "_start_worker", start)
    assert accuracy.run("clutter", ["none", "SE"], [0, 1], 2, []) == 2
    assert len(started) == 4
    assert "('clutter', 'SE', 0): failed" in capsys.readouterr().out
    started.clear()
    assert accuracy.run("clutter", ["none", "DAS"], [0, 1], 1, []) == 0
    assert started == [("clutter", "DAS", 0), ("clutter", "DAS", 1)]


def test_a_worker_that_ends_badly_is_no_result(record, monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    monkeypatch.setattr(accuracy, "__file__", str(script))
    key = ("woof", "none", 0)
    script.write_text("import json, sys; print('epoch 1'); print(json.dumps(sys.argv[1:]))")
    arguments = ["--data", "dogs"]
    assert accuracy._start_worker(key, arguments) == ["worker", *map(str, key), *arguments]
    assert "epoch 1" in accuracy._log(*key).read_text()
    script.write_text("import sys; print('epoch 1'); sys.exit('no folder')")
    assert accuracy._start_worker(key, []) is None
    assert "no folder" in accuracy._log(*key).read_text()


def test_paired_interval():
    base = {0: 50.0, 1: 52.0, 2: 51.0, 3: 90.0}
    runs = {0: 51.0, 1: 54.0, 2: 54.0, 4: 0.0}
    mean, low, high = accuracy_report.compare(runs, base)  # the differences are 1, 2, and 3
    assert mean == 2
    assert (high - mean, mean - low) == pytest.approx((4.302653 / np.sqrt(3),) * 2)
    assert accuracy_report.compare({0: 1.0}, base) is None


def test_learned_offsets_beside_frozen_ones():
    scores = {"DAS": {0: 3.0, 1: 5.0}, "DAS, offsets frozen at 0": {0: 2.0, 1: 4.0}, "SE": {0: 9.0}}
    lines = accuracy_report._learned_minus_frozen(scores)
    assert lines[-1] == "- DAS: +1.00 (+1.00 to +1.00)"
    assert accuracy_report._learned_minus_frozen({"DAS": {0: 3.0, 1: 5.0}}) == []


def test_dense_gates_are_compared_with_dense_layers():
    added = "the same layers, added"
    scores = {"DAS": {0: 5.0, 1: 5.0}, "DAS, dense": {0: 7.0, 1: 7.0}, added: {0: 4.0, 1: 4.0}}
    assert accuracy_report._difference(scores, "DAS, dense", added) == "-"
    scores[f"{added}, dense"] = {0: 6.0, 1: 6.0}
    assert accuracy_report._difference(scores, "DAS, dense", added) == "+1.00 (+1.00 to +1.00)"
    assert accuracy_report._difference(scores, "DAS", added) == "+1.00 (+1.00 to +1.00)"


# Tasks


def test_clutter_hides_a_digit_in_its_box():
    train, test = clutter.load(train=6, test=4, fragments=0, scale=(1.5, 4.0))
    again, _ = clutter.load(train=6, test=4, fragments=0, scale=(1.5, 4.0))
    np.testing.assert_array_equal(train.images, again.images)
    assert train.images.shape == (6, 64, 64, 3)
    assert train.images.dtype == np.uint8
    for image, ((top, left, bottom, right),) in zip(test.images, test.boxes.astype(int), strict=True):
        assert image[top:bottom, left:right].max() > 100
        image[top:bottom, left:right] = 0
        assert not image.any()
    cluttered, _ = clutter.load(train=6, test=0, fragments=24, scale=(1.2, 2.5))
    assert (cluttered.images > 0).mean() > 2 * (train.images > 0).mean()


def test_area_under_the_curve():
    boxes = np.array([[[0, 0, 4, 4]]])  # the upper left quarter of an 8x8 image
    found = np.zeros((1, 4, 4))
    found[0, :2, :2] = 1
    assert accuracy_gates.area_under_curve(found, boxes, (8, 8)) == 1
    assert accuracy_gates.area_under_curve(-found, boxes, (8, 8)) == 0
    assert accuracy_gates.area_under_curve(0 * found, boxes, (8, 8)) == 0.5
    assert accuracy_gates.area_under_curve(np.swapaxes(found, 1, 2)[:, ::-1], boxes, (8, 8)) < 0.5


def test_crops_are_of_the_image_and_differ():
    images = np.random.default_rng(0).integers(256, size=(8, 6, 6, 3), dtype="uint8")
    crops = accuracy_training._random_crops(images, 4, np.random.default_rng(1))
    assert crops.shape == (8, 4, 4, 3)
    places = set()
    for image, crop in zip(images, crops, strict=True):
        found = [
            (top, left, flip)
            for top in range(3)
            for left in range(3)
            for flip in (1, -1)
            if np.array_equal(crop, image[top : top + 4, left : left + 4][:, ::flip])
        ]
        places.update(found)
        assert found
    assert len(places) > 3


# Variants


@pytest.fixture
def trunk():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, 2, activation="relu", name="a")(inputs)
    x = keras.layers.Conv2D(12, 3, activation="relu", name="b")(x)
    return accuracy_tasks.Trunk(keras.Model(inputs, x), ["a", "b"])


@pytest.mark.slow
def test_all_variants_follow_the_same_layers_and_start_as_the_network_without(trunk, rng):
    images = rng.uniform(0, 255, (2, 16, 16, 3)).astype("float32")
    expected = trunk.model.predict(images, verbose=0)
    for name, attach in accuracy_variants.VARIANTS.items():
        model = attach(trunk)
        if name != "none":
            added = [
                layer for layer in model.layers if layer.name not in {of.name for of in trunk.model.layers}
            ]
            places = [layer.input._keras_history.operation.name for layer in added]
            assert [place for place in places if place in trunk.stages] == ["a", "b"], name
        if "paper's gate" not in name:
            np.testing.assert_array_equal(model(images), expected, err_msg=name)


def test_gates_before_the_residual_sums(rng):
    trunk = accuracy_tasks._small_resnet(64, None)
    model = accuracy_variants.VARIANTS["DAS, before the residual sums"](trunk)
    gates = [layer for layer in model.layers if isinstance(layer, keras_das.DASLayer)]
    before = [gate.input._keras_history.operation.name for gate in gates]
    assert before == [f"stage{number}_2_norm" for number in range(4)]
    images = rng.uniform(0, 255, (1, 64, 64, 3)).astype("float32")
    np.testing.assert_array_equal(model(images), trunk.model(images))


def test_the_added_control_and_the_pooled_term(rng):
    x = rng.normal(size=(2, 6, 5, 16)).astype("float32")
    for kind in (accuracy_variants.Added, accuracy_variants.Pooled):
        layer = kind(identity_init=True, name="gate")
        layer.build(x.shape)
        for weight in layer.weights:
            weight.assign(rng.normal(size=weight.shape))
        logits = np.asarray(layer._logits(x))
        expected = x + logits if kind is accuracy_variants.Added else x * 2 / (1 + np.exp(-logits))
        np.testing.assert_allclose(np.asarray(layer(x)), expected, rtol=1e-4, atol=1e-5)
    pooled = np.maximum(x.mean((1, 2)) @ layer.squeeze.kernel.numpy() + layer.squeeze.bias.numpy(), 0)
    pooled = pooled @ layer.excite.kernel.numpy() + layer.excite.bias.numpy()
    without = np.asarray(keras_das.DASLayer._logits(layer, x))
    np.testing.assert_allclose(logits, without + pooled[:, None, None], rtol=1e-4, atol=1e-5)


def test_bounded_offsets(rng):
    x = rng.normal(size=(2, 6, 5, 16)).astype("float32")
    layer = accuracy_variants.Bounded(name="gate")
    layer.build(x.shape)
    layer.deform.offset_bias.assign(rng.normal(0, 9, layer.deform.offset_bias.shape))
    offsets, _ = layer.predict_offsets(x)
    assert 1.5 < np.abs(offsets).max() <= 2


# TensorFlow warns that `tf.data` functions are compiled regardless.
EAGERLY = pytest.mark.filterwarnings("ignore:Even though the `tf.config:UserWarning")


@pytest.fixture
def eagerly():
    """Runs functions eagerly, which is faster than tracing graphs for a few small images."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.slow
@EAGERLY
@pytest.mark.usefixtures("eagerly")
def test_one_run_and_its_report(trunk, rng, tmp_path):
    split = accuracy_tasks.Split(
        rng.integers(256, size=(16, 18, 18, 3), dtype="uint8"),
        np.arange(16) % 2,
        np.tile([[[2, 2, 9, 9]]], (16, 1, 1)),
    )
    recipe = accuracy_tasks.Recipe(1, 8, "sgd", 0.1, 1e-3, warmup_epochs=0.5, label_smoothing=0.1, crop=16)
    task = accuracy_tasks.Task("Tiny", lambda data: (split, split), lambda *of: trunk, recipe)
    lines = []
    for variant in ("none", "DAS"):
        for seed in (0, 1):
            attach, save = accuracy_variants.VARIANTS[variant], tmp_path / f"{variant}.keras"
            figures = accuracy_training.train(task, attach, seed, None, None, save=save)
            lines.append({"task": "tiny", "variant": variant, "seed": seed, "machine": "here", **figures})
    plain, _, das, _ = lines
    assert das["multiply_adds"] > plain["multiply_adds"] > 0
    assert [gate["map"] for gate in das["gates"]] == [[7, 7], [5, 5]]
    assert all(0 <= gate["auc"] <= 1 and 0 < gate["mean"] < 2 for gate in das["gates"])
    logits = keras.models.load_model(save)(split.images[:, 1:-1, 1:-1])
    assert np.mean(np.argmax(logits, -1) == split.labels) == lines[-1]["test_accuracy"]
    text = "\n".join(accuracy_report.lines_of(lines, {"tiny": "Tiny"}))
    assert "### Tiny" in text
    assert f"| DAS | {np.mean([100 * line['test_accuracy'] for line in lines[2:]]):.2f} ±" in text
    assert f"| {das['gates'][0]['name']}, 7x7 |" in text


def test_a_keras_file_is_a_trunk_with_the_stages_of_attach_das(tmp_path, rng):
    inputs = keras.Input((64, 64, 3))
    x = inputs
    for number, stride in enumerate((4, 2, 2, 2)):
        x = keras.layers.Conv2D(4, 3, stride, "same", name=f"conv{number}")(x)
    model = keras.Model(inputs, x)
    model.save(tmp_path / "network.keras")
    trunk = accuracy_tasks.TASKS["grocery_mobile"].trunk(64, tmp_path / "network.keras")
    assert trunk.stages == ["conv0", "conv1", "conv2", "conv3"]
    images = rng.uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    np.testing.assert_array_equal(trunk.model(images), model(images))
    with pytest.raises(SystemExit, match="--weights is required"):
        accuracy_tasks.TASKS["grocery_mobile"].trunk(64, None)


@EAGERLY
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(
    ("options", "trunk_moves", "gate_moves"),
    [({"frozen": True}, False, True), ({"attention_rate": 0.0}, True, False), ({}, True, True)],
)
def test_what_a_recipe_trains(trunk, rng, options, trunk_moves, gate_moves):
    split = accuracy_tasks.Split(rng.integers(256, size=(8, 16, 16, 3), dtype="uint8"), np.arange(8) % 2)
    recipe = accuracy_tasks.Recipe(1, 8, "adamw", 1e-2, 1e-3, **options)
    task = accuracy_tasks.Task("Tiny", lambda data: (split, split), lambda *of: trunk, recipe)
    kept = []

    def attach(of):
        kept.append(accuracy_variants.VARIANTS["DAS"](of))
        return kept[0]

    before = trunk.model.get_layer("a").get_weights()
    accuracy_training.train(task, attach, 0, None, None)
    after = kept[0].get_layer("a").get_weights()
    assert any((new != old).any() for new, old in zip(after, before, strict=True)) == trunk_moves
    gate = next(layer for layer in kept[0].layers if isinstance(layer, keras_das.DASLayer))
    assert np.asarray(gate.layer_norm.gamma).any() == gate_moves


def test_multiply_adds_of_the_small_resnet():
    model = accuracy_tasks._small_resnet(64, None).model
    assert model.count_params() == pytest.approx(0.7e6, rel=0.05)
    stem = 32 * 32 * 27 * 24
    first = 32 * 32 * 2 * 9 * 24 * 24
    inputs = model.input
    upto = keras.Model(inputs, model.get_layer("stage0_out").output)
    assert accuracy_gates.multiply_adds(upto) == stem + first
