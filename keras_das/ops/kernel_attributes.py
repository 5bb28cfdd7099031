"""Settings of a convolution as attributes of the kernels' ops, for TensorFlow and JAX."""

import functools
from typing import Any, NamedTuple

from keras_das.ops.geometry import Geometry, Padding, make_windows


class Attributes(NamedTuple):
    """The attributes of the ops, by name."""

    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: str  # "SAME" or "EXPLICIT"; the kernels compute "SAME", because sizes can be unknown here
    explicit_paddings: tuple[int, int, int, int]  # top, bottom, left, right
    offset_groups: int
    has_mask: bool
    has_bias: bool


@functools.lru_cache
def make_attributes(geometry: Geometry, has_mask: bool, has_bias: bool) -> Attributes:
    """Returns the attributes of a call. The kernels derive the number of groups themselves."""
    rows, columns = geometry.rows, geometry.columns
    same = rows.padding == "same"
    return Attributes(
        strides=(rows.stride, columns.stride),
        dilations=(rows.dilation, columns.dilation),
        padding="SAME" if same else "EXPLICIT",
        explicit_paddings=(0, 0, 0, 0) if same else (*_pair(rows.padding), *_pair(columns.padding)),
        offset_groups=geometry.offset_groups,
        has_mask=has_mask,
        has_bias=has_bias,
    )


def make_geometry(attributes: Attributes, channels: int, kernel_shape: tuple[int, ...]) -> Geometry:
    """Returns the geometry that the attributes were made from, given the channels of `inputs`."""
    top, bottom, left, right = attributes.explicit_paddings
    padding: Padding = "same" if attributes.padding == "SAME" else ((top, bottom), (left, right))
    taps = (kernel_shape[0], kernel_shape[1])
    windows = make_windows(taps, attributes.strides, attributes.dilations, padding)
    return Geometry(*windows, channels // kernel_shape[2], attributes.offset_groups)


def _pair(padding: Any) -> tuple[int, int]:
    before, after = padding
    return before, after
