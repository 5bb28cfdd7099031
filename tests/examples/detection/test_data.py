"""Tests of the data sources for detection: boxes, labels, images, and splits."""

import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from examples.common import RunError, UserError
from examples.data import aerial, tfds_source
from examples.detection import coco_file, data, splits, tfds_objects, tiles, voc_folder
from examples.detection.data import DetectionData, Split, Truth

tfds = pytest.importorskip("tensorflow_datasets")

Box = tuple[float, float, float, float]


def pixels_of(split: Split, index: int) -> np.ndarray:
    """Returns the image as read in a `tf.data` pipeline."""
    dataset = tf.data.Dataset.from_tensors(np.int64(index)).map(split.image)
    return next(dataset.as_numpy_iterator())


def shade(number: int) -> int:
    return 3 * number + 5


def write_image(path: Path, width: int, height: int, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, value, value)).save(path)


def names(data: DetectionData) -> dict[str, list[str]]:
    return {name: [truth.name for truth in split.truths] for name, split in data.splits.items()}


def as_lists(truth: Truth) -> dict[str, Any]:
    assert (truth.boxes.dtype, truth.labels.dtype, truth.crowd.dtype) == ("float32", "int32", "bool")
    assert truth.boxes.shape == (len(truth.labels), 4)
    assert truth.crowd.shape == truth.labels.shape
    return {
        "size": (truth.width, truth.height),
        "boxes": truth.boxes.tolist(),
        "labels": truth.labels.tolist(),
        "crowd": truth.crowd.tolist(),
    }


def check_images(data: DetectionData, value: Mapping[str, int]) -> None:
    """Checks that every image has the size in its annotation and the gray level of its name."""
    for split in data.splits.values():
        assert len({truth.image_id for truth in split.truths}) == len(split.truths)
        for index, truth in enumerate(split.truths):
            pixels = pixels_of(split, index)
            assert pixels.dtype == "uint8"
            assert pixels.shape == (truth.height, truth.width, 3)
            assert (pixels == value[truth.name]).all()


# Pascal VOC


def write_voc(
    root: Path, images: Mapping[str, list[tuple[str, Box]]], width: int = 60, height: int = 40
) -> Path:
    """A VOC folder without lists. Image number i has the gray level `shade(i)`."""
    for number, (stem, objects) in enumerate(images.items()):
        write_image(root / "JPEGImages" / f"{stem}.png", width, height, shade(number))
        write_annotation(root, stem, objects, width, height)
    return root


def write_annotation(root: Path, stem: str, objects: list[tuple[str, Box]], width: int, height: int) -> None:
    corners = ("xmin", "ymin", "xmax", "ymax")
    items = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    path = root / "Annotations" / f"{stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>C:/elsewhere.jpg</filename>{size}{items}</annotation>")


def write_lists(root: Path, **lists: list[str]) -> None:
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, stems in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


CELLS: dict[str, list[tuple[str, Box]]] = {
    "a": [("white", (1, 2, 30, 40)), ("red", (5.5, 6, 7, 8))],
    "b": [],
    "c": [("red", (-5, 10, 20, 50)), ("red", (70, 10, 80, 20)), ("red", (9, 9, 9, 12))],
    "d": [("platelet", (0, 0, 60, 40))],
}


def test_voc_lists(tmp_path: Path) -> None:
    root = write_voc(tmp_path, CELLS)
    write_lists(root, train=["c", "a", "c"], val=["b"], test=["d"], trainval=["a", "b", "c"])
    loaded = data.load(f"voc:{root}", seed=0)
    assert loaded.class_names == ["platelet", "red", "white"]
    assert list(loaded.category_ids) == [1, 2, 3]
    assert names(loaded) == {"train": ["c.png", "a.png"], "val": ["b.png"], "test": ["d.png"]}
    first, second = (as_lists(truth) for truth in loaded.splits["train"].truths)
    assert first == {"size": (60, 40), "boxes": [[0, 10, 20, 40]], "labels": [1], "crowd": [False]}
    assert second == {
        "size": (60, 40),
        "boxes": [[1, 2, 30, 40], [5.5, 6, 7, 8]],
        "labels": [2, 1],
        "crowd": [False, False],
    }
    assert as_lists(loaded.splits["val"].truths[0]) == {
        "size": (60, 40),
        "boxes": [],
        "labels": [],
        "crowd": [],
    }
    assert [split.dropped for split in loaded.splits.values()] == [2, 0, 0]
    assert [truth.image_id for truth in loaded.splits["train"].truths] == [0, 1]
    check_images(loaded, {f"{stem}.png": shade(number) for number, stem in enumerate(CELLS)})


def test_voc_without_lists_is_held_out_by_seed(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {f"{number:02}": [("red", (1, 1, 9, 9))] for number in range(20)})
    found = names(voc_folder.load(str(root), seed=1))
    assert {name: len(part) for name, part in found.items()} == {"train": 14, "val": 2, "test": 4}
    assert sorted(itertools.chain(*found.values())) == [f"{number:02}.png" for number in range(20)]
    assert found["train"] == sorted(found["train"])
    assert names(voc_folder.load(str(root), seed=1)) == found
    assert names(voc_folder.load(str(root), seed=2)) != found


def test_voc_with_some_lists(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {str(number): [("red", (1, 1, 9, 9))] for number in range(9)})
    write_lists(root, test=["3", "5"])
    found = names(voc_folder.load(str(root), seed=1))
    assert found["test"] == ["3.png", "5.png"]
    assert sorted(found["train"] + found["val"]) == [f"{i}.png" for i in (0, 1, 2, 4, 6, 7, 8)]
    write_lists(root, train=["0", "1", "2"])
    found = names(voc_folder.load(str(root), seed=1))
    assert sorted(found["train"] + found["val"]) == ["0.png", "1.png", "2.png"]


def test_voc_folders_that_contradict_themselves(tmp_path: Path) -> None:
    def refuses(message: str, kind: type[Exception] = UserError) -> None:
        with pytest.raises(kind, match=message):
            data.load(f"voc:{tmp_path}", seed=0)

    refuses("not a Pascal VOC folder: .* has no folder Annotations")
    (tmp_path / "Annotations").mkdir()
    refuses("has too few images for validation")
    write_voc(tmp_path, CELLS)
    write_lists(tmp_path, train=["a", "b"], val=["b"], test=["d"])
    refuses(r"val\.txt: b is in train\.txt as well")
    write_lists(tmp_path, val=[])
    refuses(r"val\.txt lists no images")
    write_lists(tmp_path, val=["nowhere"])
    refuses(r"no annotation of image nowhere: .*/Annotations/nowhere\.xml")
    write_lists(tmp_path, val=["c"])
    image = tmp_path / "JPEGImages" / "c.png"
    write_image(image, 61, 40)
    refuses(rf"{image} is 61 x 40 pixels, .*/Annotations/c\.xml says 60 x 40")
    image.write_bytes(b"not an image")
    refuses(f"cannot read image: {image}: ", RunError)
    image.unlink()
    refuses(r"Annotations/c\.xml refers to a missing image: .*/JPEGImages/c\.jpg")
    (tmp_path / "Annotations" / "c.xml").write_text("<annotation>")
    refuses(r"cannot read annotation: .*/Annotations/c\.xml: no element found")
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    write_lists(tmp_path, val=["b"], train=["a"])
    refuses("has no folder JPEGImages")


def test_a_split_without_images_and_a_train_split_without_boxes(tmp_path: Path) -> None:
    root = write_voc(tmp_path, CELLS)
    write_lists(root, train=["b"], val=["a"], test=["d"])
    with pytest.raises(UserError, match=f"--data voc:{root}: no image of the split train has a box"):
        data.load(f"voc:{root}", seed=0)
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    write_lists(root, val=["a", "b"], test=["c", "d"])
    with pytest.raises(UserError, match=f"--data voc:{root}: there are no images in the split train"):
        data.load(f"voc:{root}", seed=0)


def test_an_image_that_breaks_off_is_named(tmp_path: Path) -> None:
    root = write_voc(tmp_path, CELLS)
    write_lists(root, train=["a"], val=["b"], test=["d"])
    image = root / "JPEGImages" / "d.png"
    image.write_bytes(image.read_bytes()[:-20])
    split = data.load(f"voc:{root}", seed=0).splits["test"]
    assert isinstance(split, splits.FileSplit)
    with pytest.raises(RunError, match=f"cannot read image: {image}: "):
        split.check()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "gif"])
def test_kinds_of_images(tmp_path: Path, mode: str) -> None:
    path = tmp_path / {"gif": "a.gif", "CMYK": "a.jpg"}.get(mode, "a.png")
    frames = [Image.new("RGB", (30, 20), (0, 255, 0))] if mode == "gif" else []
    image = Image.new("RGB", (30, 20), (102, 102, 102))
    options = {"save_all": True, "append_images": frames} if frames else {}
    (image if frames else image.convert(mode)).save(path, **options)
    pixels = pixels_of(splits.FileSplit([], 0, splits.on_cpu([str(path)])), 0)
    np.testing.assert_allclose(pixels, np.full((20, 30, 3), 102), atol=3)


# COCO


def coco(count: int = 10) -> dict[str, list[dict[str, Any]]]:
    """Images of 60x40 with ids starting at 100. The first one has two boxes, and the others have one each."""
    images = [
        {"id": 100 + number, "file_name": f"{number}.png", "width": 60, "height": 40}
        for number in range(count)
    ]
    boxes = [
        {"id": number, "image_id": 100 + number, "category_id": 18, "bbox": [number, 2, 10, 5.5]}
        for number in range(count)
    ]
    boxes.append({"id": 99, "image_id": 100, "category_id": 3, "bbox": [30, 10, 50, 60], "iscrowd": 1})
    categories = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
    return {"images": images, "annotations": boxes, "categories": categories}


def write_coco(root: Path, content: Any) -> str:
    """Writes the annotations and gray images, and returns the value of `--data`."""
    if isinstance(content, dict):
        for number, image in enumerate(content.get("images", [])):
            write_image(root / "images" / image["file_name"], 60, 40, shade(number))
    (root / "boxes.json").write_text(json.dumps(content))
    return f"coco:{root / 'boxes.json'},{root / 'images'}"


def by_id(loaded: DetectionData) -> dict[int, Truth]:
    return {truth.image_id: truth for split in loaded.splits.values() for truth in split.truths}


def test_coco(tmp_path: Path) -> None:
    loaded = data.load(write_coco(tmp_path, coco()), seed=0)
    assert loaded.class_names == ["car", "dog", "toothbrush"]
    assert list(loaded.category_ids) == [3, 18, 90]
    truths = by_id(loaded)
    assert sorted(truths) == list(range(100, 110))
    assert as_lists(truths[100]) == {
        "size": (60, 40),
        "boxes": [[0, 2, 10, 7.5], [30, 10, 60, 40]],
        "labels": [1, 0],
        "crowd": [False, True],
    }
    assert as_lists(truths[107])["boxes"] == [[7, 2, 17, 7.5]]
    check_images(loaded, {f"{number}.png": shade(number) for number in range(10)})


def test_coco_is_held_out_by_seed(tmp_path: Path) -> None:
    spec = write_coco(tmp_path, coco(20))
    found = names(data.load(spec, seed=1))
    assert {name: len(part) for name, part in found.items()} == {"train": 14, "val": 2, "test": 4}
    assert len(set(itertools.chain(*found.values()))) == 20
    assert names(data.load(spec, seed=1)) == found
    assert names(data.load(spec, seed=2)) != found


def test_coco_images_without_boxes_with_many_and_with_boxes_outside(tmp_path: Path) -> None:
    content = coco()
    content["annotations"] = [
        *({"image_id": 101, "category_id": 3, "bbox": [x % 50, x % 30, 2, 3]} for x in range(500)),
        *({"image_id": 102, "category_id": 3, "bbox": box} for box in ([60, 0, 5, 5], [-9, 0, 9, 5])),
        *({"image_id": 103, "category_id": 3, "bbox": box} for box in ([5, 5, 0, 9], [5, 5, 9, -2])),
        *({"image_id": 104, "category_id": 3, "bbox": box} for box in ([-9, -9, 10, 12], [1, 1, 1, 1])),
    ]
    loaded = data.load(write_coco(tmp_path, content), seed=0)
    truths = by_id(loaded)
    counts = {index: len(truth.boxes) for index, truth in truths.items()}
    assert counts == {index: {101: 500, 104: 2}.get(index, 0) for index in range(100, 110)}
    assert as_lists(truths[104])["boxes"] == [[0, 0, 1, 3], [1, 1, 2, 2]]
    assert sum(split.dropped for split in loaded.splits.values()) == 4
    for split in loaded.splits.values():
        ids = {truth.image_id for truth in split.truths}
        assert split.dropped == 2 * len(ids & {102, 103})


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("annotations", {"category_id": 7}, r"a box of 1\.png has the category id 7, which is not among"),
        ("annotations", {"image_id": 5}, "there is a box for image 5, which is not among the images"),
        ("annotations", {"bbox": [1, 2, 3]}, r"annotations\[1\]: bbox must be x, y, width and height, not"),
        ("annotations", {"bbox": [1, 2, 3, float("nan")]}, r"annotations\[1\]: bbox must be x, y, width"),
        ("annotations", {"bbox": None}, r"annotations\[1\]: 'NoneType' object is not iterable"),
        ("annotations", {"bbox": [1, 2, "wide", 4]}, r"annotations\[1\]: could not convert"),
        ("images", {"width": 0}, r"images\[1\]: the size of 1\.png is 0 x 40"),
        ("images", {"id": 100}, "two of images have the id 100"),
        ("images", {"id": "first"}, r"images\[1\]: invalid literal"),
        ("images", {"width": 61}, r"images/1\.png is 60 x 40 pixels, .*boxes\.json says 61 x 40"),
        ("categories", {"id": 18}, "two of categories have the id 18"),
    ],
)
def test_coco_entries_that_are_wrong(tmp_path: Path, key: str, entry: dict, message: str) -> None:
    content = coco()
    content[key][1] = content[key][1] | entry
    with pytest.raises(UserError, match=message):
        data.load(write_coco(tmp_path, content), seed=0)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("images", "file_name"),
        ("annotations", "bbox"),
        ("annotations", "category_id"),
        ("categories", "name"),
    ],
)
def test_coco_entries_that_lack_something(tmp_path: Path, key: str, field: str) -> None:
    content = coco()
    spec = write_coco(tmp_path, content)
    del content[key][2][field]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"boxes\.json: {key}\[2\]: it has no '{field}'"):
        data.load(spec, seed=0)


def test_coco_files_that_cannot_be_read(tmp_path: Path) -> None:
    spec = write_coco(tmp_path, coco())
    file = tmp_path / "boxes.json"
    image = tmp_path / "images" / "4.png"
    image.unlink()
    with pytest.raises(UserError, match=rf"{file} refers to a missing image: {image}"):
        data.load(spec, seed=0)
    file.write_text('{"images": [')
    with pytest.raises(UserError, match=rf"cannot read annotations: {file}: Expecting value"):
        data.load(spec, seed=0)
    file.write_bytes(b"\xff\xfe\xfa\xfb\xfc")
    with pytest.raises(UserError, match=rf"cannot read annotations: {file}: "):
        data.load(spec, seed=0)
    for content in ([], {"images": []}, {"images": [], "annotations": {}, "categories": []}):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{file} has no list '.*': it is not a COCO file of objects"):
            data.load(spec, seed=0)
    file.write_text(json.dumps(coco(1)))
    with pytest.raises(UserError, match=rf"{file} has too few images for validation"):
        data.load(spec, seed=0)
    file.unlink()
    with pytest.raises(UserError, match=rf"cannot read annotations: {file}: No such file"):
        data.load(spec, seed=0)
    with pytest.raises(UserError, match="folder of images not found: /nowhere"):
        data.load(f"coco:{file},/nowhere", seed=0)
    for arguments in ("boxes.json", "boxes.json,", ",images"):
        with pytest.raises(UserError, match=f"needs both, not '{arguments}'"):
            coco_file.load(arguments, seed=0)


# Aerial photographs (the original data)


@pytest.fixture(scope="module")
def trees() -> DetectionData:
    return data.load("trees", seed=0)


def test_tiles_show_their_place_and_no_pixel_is_in_two_splits(trees: DetectionData) -> None:
    for photograph in aerial.load():
        height, width = photograph.pixels.shape[:2]
        owners = np.zeros((3, height, width), bool)
        for number, (name, split) in enumerate(trees.splits.items()):
            found = [i for i, truth in enumerate(split.truths) if truth.name.endswith(photograph.name)]
            places = tiles.tiles(width, height, name)
            assert len(places) == len(found)
            for index, (x1, y1, x2, y2) in zip(found, places, strict=True):
                assert 0 <= x1 < x2 <= width
                assert 0 <= y1 < y2 <= height
                np.testing.assert_array_equal(
                    split.image(tf.constant(index, tf.int64)), photograph.pixels[y1:y2, x1:x2]
                )
                owners[number, y1:y2, x1:x2] = True
        assert owners.sum(axis=0).max() == 1
        assert owners.any(axis=0).all()  # the tiles of a cell reach its borders


def test_tiles_are_close_enough_and_worth_having(trees: DetectionData) -> None:
    assert trees.class_names == ("crown",)
    assert list(trees.category_ids) == [1]
    assert tiles._starts(100, 356) == [100]
    assert tiles._starts(0, 383) == [0, 127]
    assert tiles._starts(10, 410) == [10, 82, 154]
    for name, images, boxes in (("train", 150, 1500), ("val", 40, 300), ("test", 50, 400)):
        truths = trees.splits[name].truths
        assert len(truths) >= images
        assert sum(len(truth.boxes) for truth in truths) >= boxes
        assert any(not len(truth.boxes) for truth in truths)
        assert (
            len({truth.image_id for truth in truths}) == len({truth.name for truth in truths}) == len(truths)
        )
        assert all(as_lists(truth)["size"] == (256, 256) for truth in truths)
        corners = np.concatenate([truth.boxes for truth in truths])
        assert corners.min() >= 0
        assert corners.max() <= 256
        assert (corners[:, 2:] > corners[:, :2]).all()
        assert trees.splits[name].dropped > 0


def test_crowns_on_the_border_of_a_tile() -> None:
    boxes = np.array(
        [
            [110, 220, 140, 260],  # inside
            [90, 210, 110, 230],  # half of it
            [89, 210, 110, 230],  # slightly less than half
            [346, 446, 366, 466],  # a quarter, at the corner
            [10, 10, 20, 20],  # elsewhere
        ],
        "float32",
    )
    found, dropped = tiles.crowns(boxes, (100, 200, 356, 456))
    assert found.tolist() == [[10, 20, 40, 60], [0, 10, 10, 30]]
    assert found.dtype == "float32"
    assert dropped == 2


# TensorFlow Datasets

SHAPES = [
    ([(0.1, 0.2, 0.5, 0.6)], [2]),
    ([], []),
    ([(0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.5, 0.75), (0.5, 0.5, 0.5, 0.9)], [0, 1, 1]),
]


class Shapes(tfds.core.GeneratorBasedBuilder):
    """A dataset of 40 images of 20x10 and a split of 3, prepared on disk like published datasets."""

    VERSION = tfds.core.Version("1.0.0")
    NAMES = ("disc", "box", "star")

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=list(self.NAMES)),
        }
        features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(objects)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples(40), "test": self._generate_examples(3)}

    def _generate_examples(self, count: int) -> Iterator:
        for number in range(count):
            boxes, labels = SHAPES[number % 3]
            objects = [
                {"bbox": tfds.features.BBox(*box), "label": label}
                for box, label in zip(boxes, labels, strict=True)
            ]
            yield number, {"image": np.full((10, 20, 3), shade(number), "uint8"), "objects": objects}


SLICES = {"train": "train[:95%]", "val": "train[95%:100%]", "test": "test"}


def load_shapes(folder: Path) -> DetectionData:
    return data.load("tfds:shapes", seed=0, data_dir=str(folder))


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.mark.parametrize("room", [3000, *(pytest.param(room, marks=pytest.mark.slow) for room in (2**30, 0))])
def test_tfds(shapes_folder: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds_objects, "IN_MEMORY_BYTES", room)
    loaded = load_shapes(shapes_folder)
    assert loaded.class_names == ["disc", "box", "star"]
    assert list(loaded.category_ids) == [1, 2, 3]
    assert {name: len(split.truths) for name, split in loaded.splits.items()} == {
        "train": 38,
        "val": 2,
        "test": 3,
    }
    in_memory = [isinstance(split, splits.EncodedSplit) for split in loaded.splits.values()]
    assert in_memory == {2**30: [True] * 3, 3000: [False, True, True], 0: [False] * 3}[room]
    seen = set()
    for name, split in loaded.splits.items():
        for index, truth in enumerate(split.truths):
            pixels = pixels_of(split, index)
            assert pixels.shape == (truth.height, truth.width, 3) == (10, 20, 3)
            number = (int(pixels[0, 0, 0]) - 5) // 3
            seen.add((name == "test", number))
            np.testing.assert_array_equal(pixels, shade(number))
            assert truth.name == f"image {index} of shapes, {SLICES[name]}"
            assert truth.image_id == index
            assert as_lists(truth) == {
                "size": (20, 10),
                **[
                    {"boxes": [[4, 1, 12, 5]], "labels": [2], "crowd": [False]},
                    {"boxes": [], "labels": [], "crowd": []},
                    {"boxes": [[0, 0, 20, 10], [10, 2.5, 15, 5]], "labels": [0, 1], "crowd": [False] * 2},
                ][number % 3],
            }
    assert len(seen) == 43
    assert sum(split.dropped for split in loaded.splits.values()) == 14


def test_the_records_of_a_file_are_found(tmp_path: Path) -> None:
    records = [b"", b"a" * 5, b"b" * 5000, b"c"]
    with tf.io.TFRecordWriter(str(tmp_path / "records")) as writer:
        for record in records:
            writer.write(record)
    spans = tfds_objects._spans(tmp_path / "records")
    path = str(tmp_path / "records").encode()
    assert [tfds_objects._read_record(path, *span) for span in spans] == records
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/nowhere: No such file"):
        tfds_objects._spans(tmp_path / "nowhere")


def test_large_sets_must_be_tfrecords() -> None:
    info = SimpleNamespace(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    with pytest.raises(
        UserError, match="tfds:big does not fit into memory and is stored as array_record; prepare"
    ):
        tfds_objects._places(SimpleNamespace(name="big", info=info), ["big.array_record__0"])


class Scenes(Shapes):
    """A dataset with the features of TFDS' COCO."""

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=list(self.NAMES)),
            "area": np.int64,
            "is_crowd": np.bool_,
        }
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator:
        for number, example in super()._generate_examples(count):
            for index, item in enumerate(example["objects"]):
                item |= {"area": 9, "is_crowd": index == 1}
            yield number, example | {"image/filename": f"{number}.jpg", "image/id": 1000 + number}


@pytest.mark.parametrize("room", [0, pytest.param(2**30, marks=pytest.mark.slow)])
def test_tfds_with_the_features_of_coco(
    tmp_path_factory: pytest.TempPathFactory, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfds_objects, "IN_MEMORY_BYTES", room)
    folder = tmp_path_factory.getbasetemp() / "scenes"
    split = data.load("tfds:scenes", seed=0, data_dir=str(folder)).splits["test"]
    truths = {truth.image_id: truth for truth in split.truths}
    assert {index: truth.name for index, truth in truths.items()} == {
        1000: "0.jpg",
        1001: "1.jpg",
        1002: "2.jpg",
    }
    assert as_lists(truths[1002]) == {
        "size": (20, 10),
        "boxes": [[0, 0, 20, 10], [10, 2.5, 15, 5]],
        "labels": [0, 1],
        "crowd": [False, True],
    }
    for index, truth in enumerate(split.truths):
        np.testing.assert_allclose(pixels_of(split, index), shade(truth.image_id - 1000), atol=2)


def test_coco_of_tfds(tmp_path: Path) -> None:
    """Uses a TFDS mock with our own examples, because TFDS' random examples have more boxes than labels."""
    asked = []

    def as_dataset(self: Any, split: str, **_: Any) -> tf.data.Dataset:
        asked.append(split)
        examples = [example() | {"image/id": number, "tfds_id": f"coco__{number}"} for number in (7, 5)]
        spec = tf.nest.map_structure(lambda value: tf.type_spec_from_value(tf.constant(value)), examples[0])
        return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        loaded = data.load("tfds:coco/2017", seed=0, data_dir=str(tmp_path))
    assert len(loaded.class_names) == len(loaded.category_ids) == 80
    assert asked == ["train[:75%]", "train[75%:80%]", "train[80%:]"]  # the mock has no validation split
    for split in loaded.splits.values():
        assert [truth.image_id for truth in split.truths] == [7, 5]
        assert pixels_of(split, 1).shape == (10, 20, 3)


def example(width: int = 20, height: int = 10, **fields: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    boxes, labels = np.array([[0.1, 0.2, 0.5, 0.6]] * 2, "float32"), np.array([1, 0])
    objects = {"bbox": boxes, "label": labels} | fields.pop("objects", {})
    return {"image": buffer.getvalue(), "objects": objects} | fields


def test_examples_of_tfds() -> None:
    found, dropped = tfds_objects._truth(
        example(objects={"is_crowd": np.array([False, True])}) | {"image/id": 77, "image/filename": b"a.jpg"},
        3,
        "image 3",
        classes=2,
    )
    assert (found.image_id, found.name, dropped) == (77, "a.jpg", 0)
    np.testing.assert_allclose(found.boxes, [[4, 1, 12, 5]] * 2, rtol=1e-6)
    assert found.labels.tolist() == [1, 0]
    assert found.crowd.tolist() == [False, True]
    with pytest.raises(UserError, match="image 3: a box has the class id 1, and there are 1 classes"):
        tfds_objects._truth(example(), 3, "image 3", classes=1)
    with pytest.raises(UserError, match="image 3: a box has the class id -1, and there are 2 classes"):
        tfds_objects._truth(example(objects={"label": np.array([0, -1])}), 3, "image 3", classes=2)
    with pytest.raises(RunError, match="cannot read image: image 3: "):
        tfds_objects._truth(example(image=b"no image"), 3, "image 3", classes=2)


def test_ids_that_are_not_unique_are_passed_over() -> None:
    found = [tfds_objects._truth(example() | {"image/id": number}, 0, "a", 2)[0] for number in (5, 9, 5)]
    assert [truth.image_id for truth in tfds_objects._with_own_ids(found)] == [0, 1, 2]
    assert [truth.image_id for truth in tfds_objects._with_own_ids(found[:2])] == [5, 9]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"label": 1}, "tfds:odd has no image: it is not a detection set"),
        ({"image": 1}, "tfds:odd has no objects: it is not a detection set"),
        ({"image": 1, "objects": {"label": 1}}, "tfds:odd has no objects/bbox"),
        ({"image": 1, "objects": {"bbox": 1}}, "tfds:odd has no objects/label"),
        ({"image": 1, "objects": {"bbox": 1, "label": 1}}, "are not class labels"),
        (
            {
                "image": 1,
                "objects": {
                    "bbox": tfds.features.BBoxFeature(bbox_format="XYXY"),
                    "label": tfds.features.ClassLabel(num_classes=2),
                },
            },
            "tfds:odd has boxes of the format XYXY; only REL_YXYX is supported",
        ),
    ],
)
def test_other_sets_of_tfds(features: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tfds_objects._check_features("odd", features)


def test_a_set_of_tfds_without_boxes(tmp_path: Path) -> None:
    with tfds.testing.mock_data(num_examples=1), pytest.raises(UserError, match="not a detection set"):
        data.load("tfds:tf_flowers", seed=0, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "test"), [("coco/2017", "validation"), ("voc/2012", "validation"), ("voc/2007", "test")]
)
def test_test_splits_that_have_labels(name: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = tfds.builder(name, data_dir="/nowhere")
    monkeypatch.setattr(type(builder.info), "splits", {"train": 0, "validation": 0, "test": 0})
    assert tfds_source.slices(builder)["test"] == test


# Values of `--data`


@pytest.mark.parametrize("spec", ["", "tree", "voc", "voc:", "coco:", "tfds:", "folder:images", "trees:x"])
def test_what_names_no_data(spec: str) -> None:
    with pytest.raises(UserError, match=f"--data must be trees, voc:DIR, coco:.* or tfds:NAME, not '{spec}'"):
        data.load(spec, seed=0)
