"""Tests of TensorFlow Datasets with TFDS' mock: random images of the right shapes, and no downloads."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from examples import backbones, classify, data
from examples.common import UserError
from examples.data import tfds_source
from examples.data.pipeline import evaluation_batches

from . import tiny

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("tf_flowers", 5),
        pytest.param("stanford_dogs", 120, marks=pytest.mark.slow),
        pytest.param("imagenet2012", 1000, marks=pytest.mark.slow),
    ],
)
def test_sets(name: str, classes: int, tmp_path: Path) -> None:
    with tfds.testing.mock_data(num_examples=8):
        dataset = data.load(f"tfds:{name}", 16, seed=0, data_dir=str(tmp_path))
        images, labels = next(iter(evaluation_batches(dataset.splits["test"], classes, 4)))
    assert len(dataset.class_names) == classes
    assert {name: split.count for name, split in dataset.splits.items()} == {"train": 8, "val": 8, "test": 8}
    assert images.shape == (4, 16, 16, 3)
    assert labels.shape == (4, classes)


class Noise(tfds.core.GeneratorBasedBuilder):
    """A dataset of 40 images in one split, prepared on disk like published datasets."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator:
        for number in range(40):
            yield number, {"image": np.full((9, 7, 3), 6 * number, "uint8"), "label": number % 2}


def test_a_prepared_set_without_a_test_split(tmp_path: Path) -> None:
    dataset = data.load("tfds:noise", 8, seed=0, data_dir=str(tmp_path))
    assert {name: split.count for name, split in dataset.splits.items()} == {"train": 30, "val": 2, "test": 8}
    shades = {
        name: {int(image.mean()) for image, _ in split.examples(None).as_numpy_iterator()}
        for name, split in dataset.splits.items()
    }
    assert len(shades["train"] | shades["val"] | shades["test"]) == 40


@pytest.mark.parametrize(
    ("name", "splits", "expected"),
    [
        ("dogs", {"train", "test"}, ("train[:95%]", "train[95%:100%]", "test")),
        ("imagenet2012", {"train", "validation", "test"}, ("train[:95%]", "train[95%:100%]", "validation")),
        ("full", {"train", "validation", "test"}, ("train[:100%]", "validation", "test")),
        ("flowers", {"train"}, ("train[:75%]", "train[75%:80%]", "train[80%:]")),
    ],
)
def test_slices(name: str, splits: set[str], expected: tuple[str, ...]) -> None:
    builder = SimpleNamespace(name=name, builder_config=None, info=SimpleNamespace(splits=splits))
    assert tfds_source.slices(builder) == dict(zip(("train", "val", "test"), expected, strict=True))


def test_a_set_without_a_train_split() -> None:
    builder = SimpleNamespace(name="odd", builder_config=None, info=SimpleNamespace(splits={"all"}))
    with pytest.raises(UserError, match="tfds:odd has no split named train, only all"):
        tfds_source.slices(builder)


@pytest.mark.slow
def test_training_with_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "resnet18", tiny.resnet18)
    arguments = ["--recipe", "stanford_dogs", "--backbone", "resnet18", "--attention", "none"]
    arguments += ["--image-size", "16", "--batch-size", "8", "--epochs", "1", "--progress", "none"]
    config, _ = classify.parse_arguments([*arguments, "--output", str(tmp_path), "--data-dir", str(tmp_path)])
    with tfds.testing.mock_data(num_examples=16):
        results = classify.train(config)
    assert results["images"] == {"train": 16, "val": 16, "test": 16}
    assert len(results["class_names"]) == 120


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot prepare tfds:no_such_set: "):
        data.load("tfds:no_such_set", 16, seed=0, data_dir=str(tmp_path))
    with tfds.testing.mock_data(num_examples=1), pytest.raises(UserError, match="not a classification set"):
        data.load("tfds:coco/2017", 16, seed=0, data_dir=str(tmp_path))
