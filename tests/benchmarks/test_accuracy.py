"""The comparison of attention modules: what it runs and skips, its statistics, and the variants of DAS."""

import json
import types

import accuracy
import accuracy_models
import accuracy_report
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from examples import backbones, classify
from tests.examples.conftest import COLOURS, write_images


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RECORD", tmp_path / "accuracy.jsonl")
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    return accuracy.RECORD


def test_what_is_in_the_record_is_not_run_again(record, monkeypatch, capsys):
    started = []

    def start(key, data, threads):
        started.append(key)
        experiment, variant, seed = key
        if variant == "se":
            return None
        return json.dumps({"experiment": experiment, "variant": variant, "seed": seed, "test_accuracy": 0.5})

    monkeypatch.setattr(accuracy, "_start_worker", start)
    assert accuracy.run("cifar10", ["none", "se"], [0, 1], "folder:x", jobs=2, threads=1) == 2
    assert len(started) == 4
    assert "('cifar10', 'se', 0): failed" in capsys.readouterr().out
    started.clear()
    assert accuracy.run("cifar10", ["none", "das"], [0, 1], "folder:x", jobs=1, threads=1) == 0
    assert started == [("cifar10", "das", 0), ("cifar10", "das", 1)]


@pytest.mark.slow
def test_a_worker_that_ends_badly_is_no_result(record):
    assert accuracy._start_worker(("cifar10", "none", 0), "folder:/no/such/folder", 1) is None
    log = accuracy._folder("cifar10", "none", 0).with_suffix(".log")
    assert "data folder not found" in log.read_text()


def test_paired_interval():
    base = {0: 50.0, 1: 52.0, 2: 51.0, 3: 90.0}
    runs = {0: 51.0, 1: 54.0, 2: 54.0, 4: 0.0}
    mean, low, high = accuracy_report.compare(runs, base)  # differences 1, 2, 3
    assert mean == 2
    assert (high - mean, mean - low) == pytest.approx((4.302653 / np.sqrt(3),) * 2)
    assert accuracy_report.compare({0: 1.0}, base) is None


@pytest.mark.slow
def test_one_run_and_its_report(record, tmp_path, monkeypatch, capfd):
    for split in ("train", "test"):
        for name in ("red", "green"):
            write_images(tmp_path / "images" / split / name, 20, COLOURS[name])
    data = f"folder:{tmp_path / 'images'}"
    recipe = {**accuracy.EXPERIMENTS["cifar10"].recipe, "image_size": 16, "epochs": 1, "batch_size": 8}
    tiny = types.MappingProxyType(
        {
            "cifar10": accuracy.Experiment(
                "Tiny", recipe, {"none": {"attention": "none"}, "das": {"attention": "das"}}, "cifar10/none"
            ),
            "finetune": accuracy.Experiment(
                "On", {**recipe, "weights": "cifar10/none"}, {"das": {"attention": "das"}}, "cifar10/none"
            ),
        }
    )
    monkeypatch.setattr(accuracy, "EXPERIMENTS", tiny)
    for experiment, variant in (("cifar10", "none"), ("cifar10", "das"), ("finetune", "das")):
        accuracy.work(experiment, variant, 0, data)
        with record.open("a") as file:
            file.write(capfd.readouterr().out.splitlines()[-1] + "\n")
    plain, das, tuned = accuracy.read_record()
    assert tuned["test_accuracy_before"] == plain["test_accuracy"]  # the identity start changes nothing
    assert das["multiply_adds"] > plain["multiply_adds"] > 0
    assert [gate["map"] for gate in das["gates"]] == [[16, 16], [8, 8], [4, 4]]
    assert all(0 <= gate["taps_outside"] <= 1 and 0 < gate["mean"] < 1 for gate in das["gates"])
    lines = accuracy_report.lines_of(accuracy.read_record(), tiny)
    assert f"| none | {100 * plain['test_accuracy']:.2f}" in "\n".join(lines)
    accuracy_report.draw([plain, das], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


# The variants of DAS


@pytest.fixture
def make(rng):
    accuracy_models.register(classify)
    keras.utils.set_random_seed(0)

    def build(attention):
        config = classify.Config(backbone="resnet20", image_size=16, attention=attention, identity_init="off")
        return classify.build_model(config, ("a", "b"))

    return build


@pytest.mark.slow
def test_frozen_offsets_stay_at_zero_and_masks_learn(make, rng):
    model = make("das_frozen")
    model.compile("sgd", "categorical_crossentropy", jit_compile=False)
    images = rng.uniform(0, 255, size=(8, 16, 16, 3))
    model.fit(images, np.eye(2)[np.arange(8) % 2], epochs=2, verbose=0)
    for gate in accuracy_models.gates_of(model):
        kernel = np.array(gate.deform.offset_kernel)
        assert not kernel[..., :18].any()
        assert not np.array(gate.deform.offset_bias)[:18].any()
        assert kernel[..., 18:].all()


def test_gates_after_every_block(make):
    assert len(accuracy_models.gates_of(make("das_blocks"))) == 9
    assert len(accuracy_models.gates_of(make("das"))) == 3


def test_norm_over_space_and_channels(rng):
    layer = accuracy_models.SpatialNormDAS()
    x = rng.normal(3, 2, size=(2, 6, 5, 4)).astype("float32")
    layer.build((None, 6, 5, 20))
    outputs = np.asarray(layer._expand_and_normalize(x))
    np.testing.assert_allclose(outputs.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(outputs.std((1, 2, 3)), 1, rtol=1e-3)
    assert np.abs(outputs.mean(3)).max() > 0.01  # not each pixel by itself


def test_a_gate_16_times_as_fast(rng):
    """One step of SGD, alike but for the gain, takes the sigmoid's argument 16 times as far."""
    x = rng.normal(size=(2, 6, 5, 16)).astype("float32")
    upstream = rng.normal(size=x.shape).astype("float32")
    moved = []
    for kind in (keras_das.DASLayer, accuracy_models.GainedDAS):
        keras.utils.set_random_seed(3)
        layer = kind(identity_init=True)
        layer.build(x.shape)
        np.testing.assert_array_equal(layer(x), x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x) * upstream)
        gradients = tape.gradient(loss, layer.trainable_variables)
        keras.optimizers.SGD(0.01).apply(gradients, layer.trainable_variables)
        half = np.asarray(layer.gate(x)).astype("float64") / 2
        moved.append(np.log(half / (1 - half)))
    assert np.abs(moved[0]).max() > 0.01
    np.testing.assert_allclose(moved[1], 16 * moved[0], rtol=1e-3, atol=1e-4)


def test_all_are_attached_to_the_same_places(make):
    places = {}
    for name in ("das", "se", "das_spatial_norm", "das_gained"):
        features = next(layer for layer in make(name).layers if isinstance(layer, keras.Model))
        kind = keras_das.DASLayer if name.startswith("das") else accuracy_models.attention.LAYERS[name]
        places[name] = [
            layer.input._keras_history.operation.name for layer in features.layers if isinstance(layer, kind)
        ]
    assert places["das"] == list(backbones.build("resnet20", 16, False).stages) == places["se"]
    assert places["das"] == places["das_spatial_norm"] == places["das_gained"]


def test_multiply_adds_of_resnet20():
    model = backbones.build("resnet20", 32, pretrained=False).model
    # 40.6 M in the literature, with shortcuts that cost nothing; ours are two projections of 0.26 M together.
    assert accuracy_models.multiply_adds(model) == pytest.approx(40.6e6, rel=0.02)
    assert model.count_params() == pytest.approx(0.27e6, rel=0.03)
