from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.common import RunError, UserError
from examples.data import Dataset, folders, load
from examples.data.pipeline import ArraySplit, FileSplit

from .conftest import COLOURS, write_images

MakeFolder = Callable[..., Path]


def counts(dataset: Dataset) -> dict[str, list[int]]:
    return {
        name: [Counter(split.labels.tolist())[label] for label in range(len(dataset.class_names))]  # type: ignore[attr-defined]
        for name, split in dataset.splits.items()
    }


def paths(dataset: Dataset) -> list[set[str]]:
    return [set(split.paths) for split in dataset.splits.values()]  # type: ignore[attr-defined]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "IN_MEMORY_BYTES", 0)


@pytest.mark.usefixtures("streamed")
def test_class_folders_are_split_class_by_class(image_folder: MakeFolder) -> None:
    root = image_folder({"red": 20, "green": 40})
    dataset = folders.load(str(root), 8, seed=1)
    assert dataset.class_names == ["green", "red"]
    assert counts(dataset) == {"train": [27, 14], "val": [5, 2], "test": [8, 4]}
    train, test, val = paths(dataset)
    assert len(train | val | test) == 60
    assert paths(folders.load(str(root), 8, seed=1)) == [train, test, val]
    assert paths(folders.load(str(root), 8, seed=2)) != [train, test, val]


@pytest.mark.usefixtures("streamed")
def test_train_and_test_folders(image_folder: MakeFolder) -> None:
    dataset = folders.load(str(image_folder(splits=("train", "test"))), 8, seed=0)
    assert counts(dataset) == {"train": [17, 17], "test": [20, 20], "val": [3, 3]}
    assert all("/train/" in path for path in dataset.splits["val"].paths)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_val_and_test_folders(image_folder: MakeFolder, val: str) -> None:
    dataset = folders.load(str(image_folder(splits=("train", val, "test"))), 8, seed=0)
    assert counts(dataset) == {"train": [20, 20], "val": [20, 20], "test": [20, 20]}


@pytest.mark.usefixtures("streamed")
def test_share(image_folder: MakeFolder) -> None:
    root = str(image_folder({"red": 20, "green": 40}, splits=("train", "val", "test")))
    dataset = folders.load(root, 8, seed=1, share=0.25)
    assert counts(dataset) == {"train": [10, 5], "val": [10, 5], "test": [40, 20]}
    assert paths(folders.load(root, 8, seed=1, share=0.25)) == paths(dataset)
    assert paths(folders.load(root, 8, seed=2, share=0.25)) != paths(dataset)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="--data-share must be above 0 and at most 1"):
            folders.load(root, 8, seed=1, share=share)
    with pytest.raises(UserError, match="--data-share requires --data folder"):
        load("trees", 8, 0, share=0.5)


def test_small_sets_are_decoded_once(image_folder: MakeFolder) -> None:
    dataset = folders.load(str(image_folder()), 8, seed=0)
    split = dataset.splits["train"]
    assert isinstance(split, ArraySplit)
    means = [split.images[split.labels == label].mean(axis=(0, 1, 2)) for label in (0, 1)]
    np.testing.assert_allclose(means, [COLOURS["green"], COLOURS["red"]], atol=10)


def test_webp_is_read_and_other_formats_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, suffix in (("red", ".webp"), ("green", ".png"), ("green", ".tif")):
        write_images(tmp_path / name, 10, COLOURS[name], suffix)
    dataset = folders.load(str(tmp_path), 8, seed=0)
    assert sum(sum(numbers) for numbers in counts(dataset).values()) == 20
    split = dataset.splits["train"]
    assert isinstance(split, ArraySplit)
    np.testing.assert_allclose(split.images[split.labels == 1].mean(axis=(0, 1, 2)), COLOURS["red"], atol=15)
    assert "green: left out 10 images of other formats, such as 000.tif" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "gif"])
def test_kinds_of_images(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (30, 20), (200, 40, 40))
    if mode == "gif":
        path = tmp_path / "a.gif"
        image.save(path, save_all=True, append_images=[Image.new("RGB", (30, 20), (0, 255, 0))])
    else:
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        image.convert(mode).save(path)
    loaded = FileSplit([str(path)], np.zeros(1, "int32"), 8).load().images[0]
    expected = np.full(3, 88) if mode == "L" else np.array([200, 40, 40])
    np.testing.assert_allclose(loaded.mean(axis=(0, 1)), expected, atol=8)


def test_shrinking_is_free_of_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), "uint8")
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    loaded = FileSplit([str(tmp_path / "a.png")], np.zeros(1, "int32"), 25).load().images[0]
    np.testing.assert_allclose(loaded, 127.5, atol=16)


def test_an_unreadable_image_is_named(image_folder: MakeFolder) -> None:
    root = image_folder()
    damaged = root / "red" / "zzz.jpg"
    damaged.write_bytes(b"not an image")
    with pytest.raises(RunError, match=f"cannot read image: {damaged}: "):
        folders.load(str(root), 8, seed=0)
    damaged.write_bytes(b"")
    with pytest.raises(RunError, match=f"cannot read image: {damaged}: "):
        folders.load(str(root), 8, seed=0)


def test_other_files_and_hidden_ones_are_passed_over(image_folder: MakeFolder) -> None:
    root = image_folder()
    (root / "red" / "notes.txt").write_text("a note")
    (root / "red" / "._000.jpg").write_bytes(b"left by another system")
    (root / ".cache").mkdir()
    (root / "readme.md").write_text("a note")
    assert sum(map(sum, counts(folders.load(str(root), 8, seed=0)).values())) == 40


def test_wrong_folders(image_folder: MakeFolder, tmp_path: Path) -> None:
    def load(path: Path) -> None:
        folders.load(str(path), 8, seed=0)

    with pytest.raises(UserError, match=r"data folder not found: .*/nowhere"):
        load(tmp_path / "nowhere")
    root = image_folder()
    with pytest.raises(UserError, match="red has 0 class folders"):
        load(root / "red")
    (root / "blue").mkdir()
    with pytest.raises(UserError, match=r"class folder .*/blue contains no images \(\.bmp, "):
        load(root)
    write_images(root / "blue", 1, COLOURS["blue"])
    with pytest.raises(UserError, match="class 'blue' has too few images"):
        load(root)


def test_splits_of_other_classes(image_folder: MakeFolder) -> None:
    root = image_folder(splits=("train", "test"))
    write_images(root / "test" / "blue", 2, COLOURS["blue"])
    with pytest.raises(UserError, match=r"train has 2 classes and .*test has 3; not in both: blue"):
        folders.load(str(root), 8, seed=0)
