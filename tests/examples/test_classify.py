import csv
import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from examples import backbones, classify, experiment, figures, training
from examples.common import UserError
from tests import processes
from tests.models.backbones import randomize

from . import tiny
from .conftest import COLOURS, ROOT, write_images

MakeFolder = Callable[..., Path]
SCRIPT = str(ROOT / "examples" / "classify.py")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SMALL = ["--backbone", "resnet18", "--image-size", "16", "--batch-size", "8", "--progress", "none"]
SMALL += ["--attention", "none", "--optimizer", "sgd", "--learning-rate", "0.02", "--weight-decay", "0.001"]


def arguments(folder: Path, output: Path, *more: str, epochs: int = 1) -> list[str]:
    """Arguments for a run on a folder of images that takes seconds."""
    return [*SMALL, "--data", f"folder:{folder}", "--output", str(output), "--epochs", str(epochs), *more]


def train(*words: str) -> dict:
    return classify.train(classify.parse_arguments(list(words))[0])


def script(*words: str, prelude: str = "") -> subprocess.CompletedProcess:
    """Runs the script in a subprocess after the Python code `prelude`."""
    code = f"import runpy\nfrom tests.examples import tiny\ntiny.install()\n{prelude}\n"
    return processes.python(code + f"runpy.run_path({SCRIPT!r}, run_name='__main__')", *words)


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "resnet18", tiny.resnet18)


class Built(Exception):
    """Raised when a run is ready to train."""


@pytest.fixture
def model_of(tiny_network: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., keras.Model]:
    """Returns a function that stops a run before training and returns the compiled model."""

    def stop(model: keras.Model, *_: object) -> None:
        raise Built(model)

    def build(*words: str) -> keras.Model:
        with pytest.raises(Built) as stopped:
            train(*words)
        return stopped.value.args[0]

    monkeypatch.setattr(classify, "_fit", stop)
    return build


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Real training


@pytest.mark.slow
def test_trees_are_told_from_the_ground(tmp_path: Path) -> None:
    """Trains ResNet-20 from scratch on 32x32 photographs. Always predicting the larger class scores 0.51."""
    output = tmp_path / "run"
    results = train(
        *["--data", "trees", "--backbone", "resnet20", "--image-size", "32", "--attention", "das"],
        *["--epochs", "4", "--batch-size", "32", "--progress", "none", "--output", str(output)],
    )
    assert results["test_accuracy"] >= 0.85
    assert results["gates"] == 3
    assert results["gate_parameters"] > 0

    confusion = np.array(results["confusion_matrix"])
    assert confusion.sum() == results["images"]["test"]
    assert results["test_accuracy"] == pytest.approx(confusion.trace() / confusion.sum())
    assert json.loads((output / "results.json").read_text()) == results
    assert [len(values) for values in results["history"].values()] == [4] * 5
    with Image.open(output / "confusion_matrix.png") as image:
        assert image.format == "PNG"
    assert (output / "gates.png").is_file()
    assert list((output / "logs" / "train").glob("events.out.tfevents.*"))
    assert not (output / "backup").exists()

    model = keras.models.load_model(output / "model.keras")
    assert model.output_shape == (None, 2)
    probabilities = model.predict(np.full((1, 32, 32, 3), 127.0), verbose=0)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("tiny_network")
def test_a_short_run(image_folder: MakeFolder, tmp_path: Path) -> None:
    """Covers everything from images to output files with a tiny network. The export accepts raw pixels."""
    import tensorflow as tf

    output, export = tmp_path / "run", tmp_path / "saved_model"
    results = train(*arguments(image_folder(), output, "--augment", "flip", "--export", str(export)))
    assert json.loads((output / "results.json").read_text()) == results
    assert np.isfinite(results["history"]["loss"]).all()
    assert np.sum(results["confusion_matrix"]) == results["images"]["test"] == 8
    assert (results["gates"], results["steps_run"]) == (0, 3)
    assert (output / "confusion_matrix.png").is_file()
    assert not (output / "backup").exists()
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype("float32")
    model = keras.models.load_model(output / "model.keras")
    served = tf.saved_model.load(str(export)).signatures["serving_default"](tf.constant(pixels))
    np.testing.assert_allclose(next(iter(served.values())), model(pixels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("policy", "attention"), [("mixed_float16", "none"), ("mixed_bfloat16", "das")])
def test_mixed_precision(
    policy: str,
    attention: str,
    image_folder: MakeFolder,
    tmp_path: Path,
    model_of: Callable[..., keras.Model],
) -> None:
    words = ["--mixed-precision", policy, "--attention", attention]
    model = model_of(*arguments(image_folder(), tmp_path / "run", *words))
    assert keras.config.dtype_policy().name == "float32"
    layers = [layer for layer in model.get_layer("tiny").layers if layer.weights]
    assert {layer.compute_dtype for layer in layers} == {policy.removeprefix("mixed_")}
    assert model.get_layer("classes").compute_dtype == "float32"


def test_xla(image_folder: MakeFolder, tmp_path: Path, model_of: Callable[..., keras.Model]) -> None:
    assert model_of(*arguments(image_folder(), tmp_path / "run", "--jit", "on")).jit_compile is True


@pytest.mark.usefixtures("tiny_network")
def test_images_that_are_read_as_they_are_needed(
    image_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = image_folder()
    monkeypatch.setattr("examples.data.folders.IN_MEMORY_BYTES", 0)
    for path in (root / "red").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    assert classify.main(arguments(root, tmp_path / "run")) == 1
    assert capsys.readouterr().err.startswith(f"classify: error: cannot read image: {root / 'red'}/")


# Interrupted runs


def kill_at(epoch: int, batch: int) -> str:
    return f"""
import os, signal
from examples import training
def kill(self, batch, logs=None, wrapped=training.StepTimer.on_train_batch_end):
    wrapped(self, batch, logs)
    if len(self.seconds) == {epoch} * 3 + {batch}:
        os.kill(os.getpid(), signal.SIGKILL)
training.StepTimer.on_train_batch_end = kill
"""


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_network")
def test_a_killed_run_continues_as_if_nothing_had_been(image_folder: MakeFolder, tmp_path: Path) -> None:
    root = image_folder({"red": 18, "green": 18})  # 24 for training: 3 steps per epoch
    words = ["--augment", "aerial", "--dropout", "0.3", "--deterministic"]
    whole = script(*arguments(root, tmp_path / "whole", *words, epochs=4))
    assert whole.returncode == 0, whole.stderr
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["steps_run"] == 12

    resumed = arguments(root, tmp_path / "killed", *words, "--resume", str(tmp_path / "state"), epochs=4)
    assert script(*resumed, prelude=kill_at(epoch=2, batch=2)).returncode == -9
    assert [row["epoch"] for row in rows(tmp_path / "killed" / "history.csv")] == ["0", "1"]
    # Simulates a run that was killed between writing the row and saving the state.
    with (tmp_path / "killed" / "history.csv").open("a") as file:
        file.write("2,0,0,0,0\n")
    finished = script(*resumed)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "killed" / "results.json").read_text())["steps_run"] == 6
    assert not (tmp_path / "state").exists()

    expected, got = (rows(tmp_path / name / "history.csv") for name in ("whole", "killed"))
    assert [row["epoch"] for row in got] == ["0", "1", "2", "3"]
    for one, other in zip(expected, got, strict=True):
        for name in one:
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_network")
def test_a_state_cut_short_falls_back_on_the_one_before(image_folder: MakeFolder, tmp_path: Path) -> None:
    state = tmp_path / "state"
    words = arguments(image_folder(), tmp_path / "run", "--resume", str(state), epochs=3)
    assert script(*words, prelude=kill_at(epoch=2, batch=2)).returncode == -9
    weights = state / "latest.weights.h5"
    weights.write_bytes(weights.read_bytes()[:5000])
    train(*words)
    assert [row["epoch"] for row in rows(tmp_path / "run" / "history.csv")] == ["0", "1", "2"]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_network")
def test_a_full_disk_loses_nothing(
    image_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments(image_folder(), tmp_path / "run")
    train(*words)
    before = (tmp_path / "run" / "model.keras").read_bytes()

    def full(self: keras.Model, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", full)
        assert classify.main(words) == 1
    error = capsys.readouterr().err
    backup = tmp_path / "run" / "backup"
    assert error.startswith("classify: error: disk full while writing ")
    assert "model.keras; the previous one is kept; training is not lost: free disk space and repeat" in error
    assert error.endswith(f" with --resume {backup}\n")
    assert (tmp_path / "run" / "model.keras").read_bytes() == before

    results = train(*words, "--resume", str(backup))
    assert results["steps_run"] == 0
    assert len(results["history"]["loss"]) == 1
    assert (tmp_path / "run" / "model.keras").read_bytes() != before


@pytest.mark.slow
def test_a_full_disk_in_the_middle_of_training(image_folder: MakeFolder, tmp_path: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))"
    words = arguments(image_folder(), tmp_path / "run", epochs=2)
    result = script(*words, prelude=limit)
    assert result.returncode == 1
    state = tmp_path / "run" / "backup"
    assert result.stderr.splitlines()[-1] == (
        "classify: error: disk full while training; free disk space and continue from the last complete "
        f"epoch with --resume {state}"
    )
    assert "Traceback" not in result.stderr
    (state / "latest.weights.h5").write_bytes(b"as if the disk had filled up later")
    assert len(train(*words, "--resume", str(state))["history"]["loss"]) == 2


# Errors


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "folder:/nowhere"], "data folder not found: /nowhere"),
        (["--data", "flowers"], "--data must be trees, folder:PATH or tfds:NAME, not 'flowers'"),
        (["--data", "folder:"], "--data must be trees, folder:PATH or tfds:NAME, not 'folder:'"),
        (
            ["--backbone", "resnet19"],
            "--backbone must be one of resnet18, resnet20, resnet50, mobilenet_v2, keras_cv:PRESET",
        ),
        (["--backbone", "keras_hub:/nowhere"], "cannot load backbone keras_hub:/nowhere: "),
        slow(["--backbone", "keras_cv:/nowhere"], "cannot load backbone keras_cv:/nowhere: "),
        (["--weights", "nowhere.keras"], "--weights: no such file: nowhere.keras"),
        slow(["--weights", "imagenet"], "resnet18 has no ImageNet weights"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--export", "/"], "--export: / exists and is not a SavedModel"),
        (["--export", "m.onnx"], "--export: m.onnx must be the path of a folder"),
        slow(["--small-stem", "--backbone", "resnet50"], "--small-stem requires --backbone resnet18"),
        slow(
            ["--das", "reduction=-1", "--attention", "das"],
            "cannot attach gates to tiny --das reduction=-1: ",
        ),
        (["--das", "no_such=1", "--attention", "das"], "cannot attach gates to tiny --das no_such=1: "),
    ],
)
def test_wrong_arguments(
    words: list[str],
    message: str,
    image_folder: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert classify.main(arguments(image_folder(), tmp_path / "run", *words)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"classify: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--jit", "maybe"], ["--epochs", "many"], ["--das", "reduction"], ["--nonsense"]]
)
def test_wrong_words(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        classify.parse_arguments(words)
    assert stop.value.code == 2


@pytest.mark.slow
def test_the_script_itself_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, *arguments(tmp_path / "nowhere", tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"classify: error: data folder not found: {tmp_path / 'nowhere'}"
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("tiny_network")
def test_weights_files(tmp_path: Path) -> None:
    path = tmp_path / "first.keras"
    words = ["--weights", str(path), "--das", "kernel_size=1"]
    config, _ = classify.parse_arguments(arguments(tmp_path, tmp_path, *words))
    first = classify.build_model(dataclasses.replace(config, weights="none"), ("green", "red"))
    randomize(first, np.random.default_rng(0))
    first.save(path)
    model = classify.build_model(config, ("green", "red"))
    first.save_weights(tmp_path / "first.weights.h5")
    pixels = np.full((1, 16, 16, 3), 99.0)
    np.testing.assert_array_equal(model(pixels), first(pixels))

    config.weights = str(tmp_path / "first.weights.h5")
    again = classify.build_model(config, ("green", "red"))
    np.testing.assert_array_equal(again(pixels), first(pixels))
    with pytest.raises(UserError, match="does not fit this model"):
        classify.build_model(config, ("blue", "green", "red"))
    config.attention = "das"
    config.weights = str(path)
    gated = classify.build_model(config, ("green", "red"))  # from the file without gates; gates start at 1
    assert gated.count_params() > first.count_params()
    np.testing.assert_allclose(gated(pixels), first(pixels), rtol=1e-5)
    randomize(gated, np.random.default_rng(1))
    gated.save(tmp_path / "gated.keras")
    config.weights = str(tmp_path / "gated.keras")  # as before, gates start at 1
    again = classify.build_model(config, ("green", "red"))
    np.testing.assert_array_equal(again(pixels), gated(pixels))
    with pytest.raises(
        UserError, match=r"have dilation_rate=\(2, 2\), .* pass --das 'dilation_rate=\(2, 2\)'"
    ):
        classify.build_model(
            dataclasses.replace(config, das={**config.das, "dilation_rate": 1}), ("green", "red")
        )

    config.attention = "none"
    config.weights = str(path)
    with pytest.raises(UserError, match="was trained for 2 classes, the data has 3"):
        classify.build_model(config, ("blue", "green", "red"))
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match=f"--weights: cannot read {path}"):
        classify.build_model(config, ("green", "red"))


@pytest.mark.slow
def test_the_state_of_another_run_is_refused(
    image_folder: MakeFolder, tmp_path: Path, model_of: Callable[..., keras.Model]
) -> None:
    root, state = image_folder(), tmp_path / "state"
    words = arguments(root, tmp_path / "run", "--resume", str(state))
    model_of(*words)  # records whose state it is
    with pytest.raises(UserError, match="contains a run with seed = 0, this one has 1"):
        train(*words, "--seed", "1")
    write_images(root / "blue", 9, COLOURS["blue"])
    with pytest.raises(UserError, match=r"contains a run with class_names = \['green', 'red'\]"):
        train(*words)
    with pytest.raises(UserError, match="is not a folder of training state"):
        train(*words[:-1], str(root))
    assert len(list(root.iterdir())) == 3


def test_a_state_goes_with_its_run(tmp_path: Path) -> None:
    state, mine = tmp_path / "state", {"seed": 0, "class_names": ["a", "b"]}
    training.prepare_backup(state, False, mine)
    training.prepare_backup(state, True, mine)
    with pytest.raises(UserError, match=rf"{state} contains a run with seed = 0, this one has 1"):
        training.prepare_backup(state, True, {**mine, "seed": 1})
    (state / "latest.weights.h5").touch()
    training.prepare_backup(state, False, mine)  # a new run clears it
    assert [path.name for path in state.iterdir()] == ["run.json"]
    (state / "run.json").rename(state / "thesis.txt")
    with pytest.raises(UserError, match="is not a folder of training state"):
        training.prepare_backup(state, True, mine)


# Arguments and components


def test_recipes_are_defaults() -> None:
    dogs, _ = classify.parse_arguments(["--recipe", "stanford_dogs", "--epochs", "7"])
    assert (dogs.data, dogs.image_size, dogs.batch_size, dogs.epochs) == ("tfds:stanford_dogs", 224, 32, 7)
    imagenet, _ = classify.parse_arguments(
        ["--das", "reduction=0.1", "--recipe", "imagenet", "--data", "folder:x"]
    )
    das = {"dilation_rate": 1, "offset_scale": 1.0, "reduction": 0.1}
    assert (imagenet.data, imagenet.epochs, imagenet.das) == ("folder:x", 100, das)
    overridden, _ = classify.parse_arguments(["--recipe", "imagenet", "--das", "offset_scale=0.3"])
    assert overridden.das == {"dilation_rate": 1, "offset_scale": 0.3}
    for recipe in classify.RECIPES.values():
        classify.INTERFACE.check(classify.Config(**recipe))


def test_learning_rates() -> None:
    steps = training.learning_rate(classify.Config(schedule="steps", epochs=100), 0.1, 10)
    assert [float(steps(step)) for step in (0, 299, 301, 601, 901)] == pytest.approx(
        [0.1, 0.1, 1e-2, 1e-3, 1e-4]
    )
    cosine = training.learning_rate(classify.Config(epochs=10, warmup_epochs=2), 0.1, 10)
    assert [float(cosine(step)) for step in (0, 10, 20, 60, 100)] == pytest.approx(
        [0, 0.05, 0.1, 0.05, 0], abs=1e-6
    )
    short = training.learning_rate(classify.Config(epochs=1, warmup_epochs=5), 0.1, 1)
    assert np.isfinite(float(short(1)))


def test_gates_alone_and_at_a_rate_of_their_own() -> None:
    config = classify.Config(
        backbone="mobilenet_v2", train="gates", gate_rate=4.0, learning_rate=0.1, schedule="constant"
    )
    model = classify.build_model(config, ("a", "b"))
    classify._freeze(model, config)
    assert {weight.path.split("/")[0][:4] for weight in model.trainable_weights} == {"das_", "clas"}
    classify.compile_model(model, config, 64)
    rates = sorted(float(optimizer.learning_rate) for optimizer in model.optimizer.optimizers)
    assert rates == pytest.approx([0.1, 0.4])
    with pytest.raises(UserError, match="--train gates"):
        classify._freeze(classify.build_model(classify.Config(attention="none"), ("a", "b")), config)


def test_das_arguments_precede_those_of_the_script() -> None:
    config, _ = classify.parse_arguments(["--backbone", "resnet20", "--das", "identity_init=True"])
    gates = experiment.gates_of(classify.build_model(config, ("a", "b")))
    assert [gate.identity_init for gate in gates] == [True] * len(gates) != []


def test_batch_norms_are_frozen() -> None:
    config = classify.Config(backbone="resnet18", freeze_batch_norm=True, attention="none")
    model = classify.build_model(config, ("a", "b"))
    classify._freeze(model, config)
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    assert norms
    assert not any(norm.trainable for norm in norms)
    assert all(layer.trainable for layer in model._flatten_layers() if isinstance(layer, keras.layers.Conv2D))


@pytest.mark.parametrize("small_stem", [slow(False), True])
def test_resnet18(small_stem: bool) -> None:
    backbone = backbones.build("resnet18", 32, pretrained=False, small_stem=small_stem)
    # He et al. report 11.69 M weights, including 0.51 M in the head, which is omitted here.
    assert backbone.model.count_params() == pytest.approx(11.18e6, rel=0.01)
    side = 4 if small_stem else 1
    assert backbone.model.output_shape == (None, side, side, 512)
    sides = [backbone.model.get_layer(name).output.shape[1] for name in backbone.stages]
    assert sides == [8 * side, 4 * side, 2 * side, side]


def tiny_preset(library: str, folder: Path) -> str:
    """The folder of a preset with a random ResNet that has one block per stage."""
    models = pytest.importorskip(library).models
    if library == "keras_hub":
        model = models.ResNetBackbone([64], [7], [64, 8, 8, 8], [1] * 4, [1, 2, 2, 2], "basic_block")
        model.save_to_preset(str(folder))
    else:
        from keras_cv.src.utils.preset_utils import save_to_preset  # KerasCV has no public alias for it

        stages = {"stackwise_filters": [64, 8, 8, 8], "stackwise_blocks": [1] * 4}
        model = models.ResNetBackbone(
            **stages, stackwise_strides=[1, 2, 2, 2], block_type="basic_block", include_rescaling=True
        )
        save_to_preset(model, str(folder))
    return f"{library}:{folder}"


@pytest.mark.parametrize(
    ("library", "weights"),
    [
        ("keras_cv", "preset"),
        pytest.param("keras_hub", "none", marks=pytest.mark.slow),
        pytest.param("keras_hub", "preset", marks=pytest.mark.slow),
        pytest.param("keras_cv", "none", marks=pytest.mark.slow),
    ],
)
def test_backbones_of_other_libraries(library: str, weights: str, tmp_path: Path) -> None:
    preset = tiny_preset(library, tmp_path / "preset")
    config = classify.Config(backbone=preset, weights=weights, image_size=32)
    model = classify.build_model(config, ("a", "b"))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(experiment.gates_of(loaded)) == 4
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(loaded(pixels), model(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_backbones_of_keras_applications(name: str) -> None:
    config = classify.Config(backbone=name, image_size=64, attention="das")
    model = classify.build_model(config, ("a", "b", "c"))
    assert len(experiment.gates_of(model)) == 4
    assert model.output_shape == (None, 3)


def test_gates_of_pretrained_backbones_start_at_one(tmp_path: Path) -> None:
    preset = tiny_preset("keras_hub", tmp_path / "preset")

    def predict(**options: str) -> np.ndarray:
        keras.utils.set_random_seed(0)
        das = {"kernel_size": 1}
        config = classify.Config(backbone=preset, weights="preset", image_size=32, das=das, **options)
        model = classify.build_model(config, ("a", "b"))
        features = keras.Model(model.inputs, model.layers[-2].input)
        return features(np.full((1, 32, 32, 3), 99.0, "float32")).numpy()

    plain = predict(attention="none")
    assert np.ptp(plain) > 0
    np.testing.assert_array_equal(predict(attention="das"), plain)
    assert not np.array_equal(predict(attention="das", identity_init="off"), plain)


def test_confusion_matrix_and_scores() -> None:
    labels, predicted = np.array([0, 0, 0, 1]), np.array([0, 1, 0, 1])
    confusion = classify.confusion_matrix(labels, predicted, 3)
    assert confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert classify.scores(confusion) == {
        "test_accuracy": 0.75,
        "test_balanced_accuracy": pytest.approx(5 / 6),
        "test_recall": [pytest.approx(2 / 3), 1.0, None],
    }


def test_confusion_matrix_of_many_classes(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(120))
    figures.draw_confusion_matrix(np.eye(120, dtype=int), names, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 1000
