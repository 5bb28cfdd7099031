"""Pascal VOC annotations: one XML file per image."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import numpy as np

from examples.common import UserError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The boxes of one image, float32 `(n, 4)`, `(x1, y1, x2, y2)` in pixels, with labels."""

    filename: str
    width: int
    height: int
    boxes: np.ndarray
    labels: list[str]
    dropped: int
    """The number of boxes without area inside the image."""


def parse(text: str | bytes, source: str) -> Annotation:
    """Read one annotation; `source` names it in errors.

    Boxes are clipped to the image. Boxes without area (degenerate or outside) are dropped.
    An image without boxes is a valid annotation.
    """
    try:
        root = ElementTree.fromstring(text)
        width, height = (int(float(root.findtext(f"size/{side}", ""))) for side in ("width", "height"))
        objects = [_parse_object(item) for item in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"cannot read annotation: {source}: {error or 'not Pascal VOC'}") from error
    if width < 1 or height < 1:
        raise UserError(f"cannot read annotation: {source}: the image size is {width} x {height}")

    boxes = np.array([box for _, box in objects], "float32").reshape(-1, 4)
    boxes = clip(boxes, (0, 0, width, height))
    keep = area(boxes) > 0
    labels = [label for (label, _), kept in zip(objects, keep, strict=True) if kept]
    filename = root.findtext("filename", "").strip()
    return Annotation(filename, width, height, boxes[keep], labels, int(np.sum(~keep)))


def _parse_object(item: ElementTree.Element) -> tuple[str, list[float]]:
    label = item.findtext("name", "").strip()
    if not label:
        raise ValueError("an object has no name")
    box = [float(item.findtext(f"bndbox/{corner}", "nan")) for corner in CORNERS]
    if not np.isfinite(box).all():
        raise ValueError(f"the box of the object {label!r} is incomplete")
    return label, box


def clip(boxes: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    """Clip `boxes` to `bounds`, both `(x1, y1, x2, y2)`."""
    x1, y1, x2, y2 = bounds
    return np.clip(boxes, np.array([x1, y1, x1, y1], boxes.dtype), np.array([x2, y2, x2, y2], boxes.dtype))


def area(boxes: np.ndarray) -> np.ndarray:
    """The area of each box; 0 where a side is not positive."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]
