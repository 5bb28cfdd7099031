"""Tests of examples/detect.py: output files, resuming, the recipe, and errors for invalid arguments."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import keras_das
from examples import detect
from examples.detection import detectors
from tests.conftest import SESSION_SEED

SMALL = ["--image-size", "128", "--batch-size", "4", "--head-layers", "1", "--progress", "none"]


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "_FILTERS", [64, 8, 8, 8])
        patch.setitem(detectors.RESNETS, "resnet18", ("basic_block", [1, 1, 1, 1]))
        yield


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory):
    """Twenty images of a bright square on noise. Two of them have no square."""
    return write_coco(tmp_path_factory.mktemp("coco"), np.random.default_rng(SESSION_SEED), 20)


@pytest.fixture(scope="module")
def whole_run(small, coco_folder, tmp_path_factory):
    """The folder and the results of an uninterrupted run of two epochs."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, train_two_epochs(coco_folder, output, "--export", str(output / "saved"))


def write_coco(tmp_path, rng, count):
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in range(count):
        pixels = rng.integers(0, 60, size=(90, 120, 3)).astype("uint8")
        if number % 10:
            x, y, side = (int(value) for value in rng.integers([0, 0, 30], [60, 30, 60]))
            pixels[y : y + side, x : x + side] = 250
            box = {"bbox": [x, y, side, side], "area": side**2, "iscrowd": 0, "category_id": 18}
            annotations.append({"id": number + 1, "image_id": 100 + number, **box})
        name = f"{number:02}.png"
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": 100 + number, "file_name": name, "height": 90, "width": 120})
    file = tmp_path / "annotations.json"
    categories = [{"id": 18, "name": "square"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return f"coco:{file},{tmp_path / 'images'}"


def config_of(*words):
    return detect.INTERFACE.parse([*SMALL, *words])[0]


def train_two_epochs(data, output, *words):
    words = ["--data", data, "--output", str(output), "--epochs", "2", "--gate-rate", "2", *words]
    return detect.train(config_of(*words))


@pytest.mark.slow
def test_run(coco_folder, whole_run):
    output, results = whole_run
    assert results == json.loads((output / "results.json").read_text())
    assert results["images"] == {"train": 14, "val": 2, "test": 4}
    assert results["class_names"] == ["square"]
    assert 0 <= results["AP"] <= results["AP50"] <= 1
    history = results["history"]
    assert len(history["loss"]) == 2
    assert history["coco_AP"][0] is None  # scored every fourth epoch and after the last
    assert history["coco_AP"][1] is not None
    measured = results["gate_statistics"]
    assert list(measured) == ["das_p2", "das_p3", "das_p4", "das_p5"]
    assert all(len(epochs) == 2 and 0 < epochs[-1]["mean"] < 1 for epochs in measured.values())
    found = json.loads((output / "detections.json").read_text())
    assert {entry["category_id"] for entry in found} <= {18}
    assert all(entry["image_id"] in range(100, 120) for entry in found)
    assert (output / "sheet.png").stat().st_size > 10_000
    assert list((output / "logs" / "pictures").glob("events*"))
    assert not (output / "backup").exists()
    config = config_of("--data", coco_folder)
    again = detect.build_detector(config, 1)
    again.network().load_weights(output / "model.weights.h5")
    images = np.random.default_rng(0).uniform(0, 255, (2, 128, 128, 3)).astype("float32")
    expected = again.predictor(128).predict_on_batch(images)
    loaded = tf.saved_model.load(output / "saved")
    served = loaded.serve(images)
    assert served.keys() == expected.keys()
    np.testing.assert_array_equal(served["count"], expected["count"])
    np.testing.assert_allclose(served["scores"], expected["scores"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(coco_folder, whole_run, tmp_path, monkeypatch):
    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.params["steps"] and self.model.optimizer.iterations == 4:  # in the second epoch
                raise KeyboardInterrupt

    original = detect._pictures
    monkeypatch.setattr(detect, "_pictures", lambda *arguments: Kill())
    with pytest.raises(KeyboardInterrupt):
        train_two_epochs(coco_folder, tmp_path)
    monkeypatch.setattr(detect, "_pictures", original)
    state = str(tmp_path / "backup")
    with pytest.raises(detect.UserError, match="contains a run with attention = das, this one has none"):
        train_two_epochs(coco_folder, tmp_path, "--resume", state, "--attention", "none")
    resumed = train_two_epochs(coco_folder, tmp_path, "--resume", state)
    np.testing.assert_allclose(resumed["history"]["loss"], whole_run[1]["history"]["loss"], rtol=1e-3)


def test_recipe():
    config, debug = detect.INTERFACE.parse(["--recipe", "coco", "--batch-size", "8"])
    assert not debug
    assert (config.data, config.epochs, config.batch_size) == ("tfds:coco/2017", 12, 8)
    assert (config.optimizer, config.schedule) == ("sgd", "steps")
    assert config.image_size == 1024
    assert config.das == {"dilation_rate": 1, "offset_scale": 1.0}


@pytest.fixture
def preset(tmp_path):
    """The folder of a KerasHub preset: a narrow ResNet with weights.

    The stages have more than 8 channels: with 8 channels and a batch of one image, TensorFlow 2.21's gradient
    of 1x1 kernels with stride 2 writes out of bounds on processors with AVX-512.
    """
    keras.utils.set_random_seed(5)
    backbone = keras_hub.models.ResNetBackbone(
        [64], [7], [64, 16, 16, 16], [1] * 4, [1, 2, 2, 2], "basic_block"
    )
    backbone.save_to_preset(str(tmp_path / "preset"))
    return backbone, ["--backbone", str(tmp_path / "preset")]


def train_by_recipe(preset, tmp_path, *words):
    """Trains with a smaller version of the COCO recipe."""
    smaller = ["--image-size", "128", "--epochs", "1", "--batch-size", "2", "--head-layers", "1"]
    output = tmp_path / "run"
    words = ["--recipe", "coco", *smaller, *preset[1], "--progress", "none", "--output", str(output), *words]
    results = detect.train(detect.INTERFACE.parse(words)[0])
    assert results["history"]["loss"][0] > 0
    assert results["arguments"]["optimizer"] == "sgd"
    assert (output / "sheet.png").exists()
    return results


def test_the_recipe_starts_from_the_presets_weights(preset):
    words = ["--recipe", "coco", "--image-size", "128", "--head-layers", "1", *preset[1]]
    model = detect.build_detector(detect.INTERFACE.parse(words)[0], 2).model
    gates = [layer for layer in model._flatten_layers() if isinstance(layer, keras_das.DASLayer)]
    assert [gate.identity_init for gate in gates] == [True] * 4
    layer = model.backbone.image_encoder.get_layer("conv1_conv")
    np.testing.assert_array_equal(layer.kernel, preset[0].get_layer("conv1_conv").kernel)
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    assert {norm.momentum for norm in norms} == {0.99}


def test_gates_at_a_rate_of_their_own(small):
    config = config_of("--gate-rate", "10", "--learning-rate", "1e-3", "--schedule", "constant")
    detector = detect.build_detector(config, 2)
    detect.compile_detector(detector, config, 3)
    gates = {gate.path for gate in detector.model._flatten_layers() if isinstance(gate, keras_das.DASLayer)}
    assert len(gates) == 4
    rates = {}
    for optimizer in detector.model.optimizer.optimizers:
        for variable in optimizer._trainable_variables:
            rates[variable.path] = float(optimizer.learning_rate)
    assert len(rates) == len(detector.model.trainable_variables)
    for path, rate in rates.items():
        of_a_gate = any(path.startswith(f"{gate}/") for gate in gates)
        assert rate == pytest.approx(1e-2 if of_a_gate else 1e-3), path


def test_boxes_in_pixels_of_the_original_images(coco_folder):
    """Images of 90x120 pixels are resized to a width of 128. Boxes are clipped to the image."""

    def predict(images):
        boxes = tf.constant([[[16.0, 32, 64, 80], [64, 0, 160, 160], [0, 0, 9, 9]]])
        count = tf.shape(images)[0]
        found = {"boxes": boxes, "scores": tf.constant([[0.9, 0.8, 0.0]]), "classes": tf.zeros([1, 3])}
        found = {name: tf.repeat(value, count, axis=0) for name, value in found.items()}
        return {**found, "count": tf.fill([count], 2)}

    config = config_of("--data", coco_folder)
    split = detect.data.load(config.data, 0).splits["test"]
    found = detect.detect(predict, split, config)
    assert [boxes.image_id for boxes in found] == [truth.image_id for truth in split.truths]
    for boxes in found:
        np.testing.assert_allclose(boxes.boxes, [[15, 30, 60, 75], [60, 0, 120, 90]], rtol=1e-5)
        np.testing.assert_allclose(boxes.scores, [0.9, 0.8], rtol=1e-6)


@pytest.mark.slow
def test_the_recipe_trains_on_coco_of_tfds(preset, tmp_path, rng):
    """Trains with fewer images than a batch holds.

    Uses a TFDS mock with our own examples, because TFDS' random examples have more boxes than labels.
    """

    def as_dataset(self, split, **_):
        examples = [
            {
                "image": tf.io.encode_png(rng.integers(0, 255, (90, 120, 3)).astype("uint8")).numpy(),
                "image/id": number,
                "tfds_id": f"coco__{number}",
                "objects": {"bbox": np.array([[0.1, 0.2, 0.5, 0.6]], "float32"), "label": np.array([number])},
            }
            for number in range(1)
        ]
        spec = tf.nest.map_structure(lambda value: tf.type_spec_from_value(tf.constant(value)), examples[0])
        return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        results = train_by_recipe(preset, tmp_path, "--data-dir", str(tmp_path / "tfds"))
    assert results["images"] == {"train": 1, "val": 1, "test": 1}
    assert len(results["class_names"]) == 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "pigeons"], "--data must be trees, voc:DIR, coco:"),
        (["--image-size", "100"], "--image-size must be a multiple of 128, not 100"),
        (["--score-every", "0"], "--score-every must be at least 1, not 0"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--data", "coco:/no/such.json,/no"], ""),
        (["--export", __file__], f"--export: {__file__} exists and is not a SavedModel"),
    ],
)
def test_wrong_arguments(words, message, tmp_path, capsys):
    assert detect.main([*words, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"detect: error: {message}")
    assert error.count("\n") == 1
