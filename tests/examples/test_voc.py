import numpy as np
import pytest

from examples.common import UserError
from examples.data import voc


def annotation(objects: str = "", size: str = "<width>100</width><height>50</height>") -> str:
    return f"<annotation><filename>a.png</filename><size>{size}</size>{objects}</annotation>"


def item(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


def test_boxes_and_labels_are_read_in_order() -> None:
    parsed = voc.parse(annotation(item("tree", 1, 2, 30, 40) + item(" dead ", 5.5, 6, 7, 8)), "a.xml")
    assert (parsed.filename, parsed.width, parsed.height) == ("a.png", 100, 50)
    assert parsed.labels == ["tree", "dead"]
    np.testing.assert_array_equal(parsed.boxes, np.array([[1, 2, 30, 40], [5.5, 6, 7, 8]], "float32"))


def test_image_without_boxes() -> None:
    parsed = voc.parse(annotation(), "a.xml")
    assert parsed.boxes.shape == (0, 4)
    assert parsed.boxes.dtype == "float32"
    assert parsed.labels == []


def test_boxes_are_clipped_and_those_without_area_dropped() -> None:
    objects = [
        item("clipped", -5, -5, 500, 20),
        item("line", 10, 10, 10, 20),
        item("reversed", 30, 30, 20, 20),
        item("outside", 200, 10, 300, 20),
        item("good", 1, 1, 2, 2),
    ]
    parsed = voc.parse(annotation("".join(objects)), "a.xml")
    assert parsed.labels == ["clipped", "good"]
    assert parsed.boxes.tolist() == [[0, 0, 100, 20], [1, 1, 2, 2]]
    assert parsed.dropped == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation>", "no element found"),
        ("", "no element found"),
        (annotation(size=""), "could not convert"),
        (annotation(size="<width>0</width><height>5</height>"), "0 x 5"),
        (annotation("<object><bndbox/></object>"), "no name"),
        (annotation("<object><name>tree</name><bndbox><xmin>1</xmin></bndbox></object>"), "is incomplete"),
        (annotation(item("tree", 1, 2, "wide", 4)), "could not convert"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_read_is_named(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"cannot read annotation: a.xml: .*{reason}"):
        voc.parse(text, "a.xml")
