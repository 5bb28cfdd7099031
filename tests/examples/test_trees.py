"""Tests of the aerial photographs. The first run downloads the original data from PyPI, as for users."""

import io
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from examples.common import UserError
from examples.data import aerial, trees, voc


@pytest.fixture(scope="module")
def photographs() -> list[aerial.Photograph]:
    return aerial.load()


@pytest.fixture(scope="module")
def patches(photographs: list[aerial.Photograph]) -> list[trees.Patch]:
    return trees.find_patches(photographs)


def covered(bounds: list[tuple[int, int, int, int]], shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for x1, y1, x2, y2 in bounds:
        mask[y1:y2, x1:x2] = True
    return mask


def test_the_photographs(photographs: list[aerial.Photograph]) -> None:
    assert [photograph.pixels.shape for photograph in photographs] == [
        (2472, 2299, 3),
        (1035, 1249, 3),
        (400, 400, 3),
        (400, 400, 3),
    ]
    assert [len(photograph.annotation.boxes) for photograph in photographs] == [574, 279, 61, 37]
    for photograph in photographs:
        assert photograph.pixels.shape[:2] == (photograph.annotation.height, photograph.annotation.width)


def test_no_pixel_is_in_two_splits(photographs: list[aerial.Photograph], patches: list[trees.Patch]) -> None:
    for index, photograph in enumerate(photographs):
        masks = [
            covered(
                [p.bounds for p in patches if p.photograph == index and p.split == split],
                photograph.pixels.shape[:2],
            ).astype(int)
            for split in ("train", "val", "test")
        ]
        assert sum(masks).max() == 1


@pytest.mark.parametrize("size", [(2299, 2472), (1249, 1035), (400, 400), (90, 3000)])
def test_cells_tile_the_photograph(size: tuple[int, int]) -> None:
    width, height = size
    count = sum(covered([cell.bounds], (height, width)).astype(int) for cell in trees.cells(width, height))
    assert (count.min(), count.max()) == (1, 1)


def test_patches_lie_inside_and_show_their_class(
    photographs: list[aerial.Photograph], patches: list[trees.Patch]
) -> None:
    crowns = [np.array(photograph.annotation.boxes) for photograph in photographs]
    masks = [
        covered(boxes.round().astype(int).tolist(), photograph.pixels.shape[:2])
        for boxes, photograph in zip(crowns, photographs, strict=True)
    ]
    for patch in patches:
        x1, y1, x2, y2 = patch.bounds
        height, width = masks[patch.photograph].shape
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert x2 - x1 == y2 - y1 >= trees.MIN_SIDE
        share = masks[patch.photograph][y1:y2, x1:x2].mean()
        if patch.label == trees.CLASS_NAMES.index("background"):
            assert share <= 0.02
        else:
            boxes = crowns[patch.photograph]
            inside = voc.area(voc.clip(boxes, patch.bounds)) / voc.area(boxes)
            assert inside.max() >= trees.MIN_KEPT


def test_classes_are_balanced_and_every_split_is_worth_having(patches: list[trees.Patch]) -> None:
    for split, low in {"train": 1100, "val": 200, "test": 280}.items():
        labels = [patch.label for patch in patches if patch.split == split]
        assert len(labels) >= low
        assert np.mean(labels) == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_patches_are_the_same_each_time(
    photographs: list[aerial.Photograph], patches: list[trees.Patch]
) -> None:
    assert trees.find_patches(photographs) == patches


def test_images(patches: list[trees.Patch]) -> None:
    splits = trees.load(16)
    for split, (images, labels) in splits.items():
        assert images.shape == (len(labels), 16, 16, 3)
        assert images.dtype == "uint8"
        assert labels.tolist() == [patch.label for patch in patches if patch.split == split]


def test_boxes_on_the_border_of_a_cell_and_too_large_ones() -> None:
    cell = trees.Cell("train", (100, 100, 300, 300))
    boxes = np.array(
        [
            [90, 200, 140, 240],  # mostly inside: kept, with the patch shifted into the cell
            [60, 200, 120, 240],  # mostly outside
            [105, 105, 295, 295],  # inside, but its context is not
            [200, 200, 200.5, 200.5],  # tiny
        ],
        "float32",
    )
    assert [patch.bounds for patch in trees._crowns(boxes, cell, 0)] == [
        (100, 194, 152, 246),
        (184, 184, 216, 216),
    ]


def test_a_photograph_full_of_crowns_gives_no_background() -> None:
    boxes = np.array([[0, 0, 200, 200]], "float32")
    photograph = aerial.Photograph(
        "full", np.zeros((200, 200, 3), "uint8"), voc.Annotation("full", 200, 200, boxes, ["Tree"], 0)
    )
    assert [patch.label for patch in trees.find_patches([photograph])] == []


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """Makes `pip download` write `content`, or fail if it is None. Returns the commands."""
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No route to PyPI\n")
        (Path(command[command.index("--dest") + 1]) / aerial.WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_wheel_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(UserError, match=rf"sha256 .* expected {aerial.SHA256}"):
        aerial.fetch_wheel(tmp_path)
    assert not (tmp_path / aerial.WHEEL).exists()


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(
        UserError, match=r"cannot download deepforest==2\.1\.0 from PyPI: ERROR: No route to PyPI"
    ):
        aerial.fetch_wheel(tmp_path)


def test_the_wheel_is_downloaded_once_and_again_if_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / aerial.WHEEL).write_bytes(buffer.getvalue())
    monkeypatch.setattr(aerial, "SHA256", aerial._digest(tmp_path / aerial.WHEEL))
    commands = fake_pip(monkeypatch, buffer.getvalue())

    assert aerial.fetch_wheel(tmp_path).read_bytes() == buffer.getvalue()
    assert commands == []
    (tmp_path / aerial.WHEEL).write_bytes(buffer.getvalue()[:-1])
    assert aerial.fetch_wheel(tmp_path).read_bytes() == buffer.getvalue()
    assert len(commands) == 1
    assert "--no-deps" in commands[0]
