"""Window arithmetic: validation of arguments, and positions of the kernel's taps."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import keras
import numpy as np
from keras import ops

Padding = str | tuple[tuple[int, int], tuple[int, int]]


def as_integer(value: Any) -> int | None:
    """Returns `value` as a Python integer if it is an integer, including NumPy's; otherwise `None`."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def standardize_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Returns `value` as a pair of positive integers, or raises an error that names the argument."""
    single = as_integer(value)
    values = value if isinstance(value, Sequence | np.ndarray) else ()
    pair = (single, single) if single is not None else tuple(as_integer(v) for v in values)
    if len(pair) != 2 or any(v is None or v < 1 for v in pair):
        raise ValueError(f"`{name}` must be a positive integer or a pair of them. Received: {name}={value!r}")
    return cast(tuple[int, int], pair)


def standardize_padding(padding: Any) -> Padding:
    """Returns "valid", "same" or a pair of pairs of non-negative integers, or raises a ValueError."""
    if isinstance(padding, str) and padding.lower() in ("valid", "same"):
        return padding.lower()
    try:
        (top, bottom), (left, right) = padding
        pads = [as_integer(p) for p in (top, bottom, left, right)]
        if not isinstance(padding, str) and all(p is not None and p >= 0 for p in pads):
            return cast(Padding, (tuple(pads[:2]), tuple(pads[2:])))
    except (TypeError, ValueError):
        pass  # Not a pair of pairs; the error below describes what is expected.
    raise ValueError(
        '`padding` must be "valid", "same" or ((top, bottom), (left, right)) with non-negative integers. '
        f"Received: padding={padding!r}"
    )


def standardize_data_format(data_format: str | None) -> str:
    """Returns "channels_last" or "channels_first"; `None` selects Keras' default."""
    value = keras.config.image_data_format() if data_format is None else str(data_format).lower()
    if value not in ("channels_last", "channels_first"):
        raise ValueError(
            '`data_format` must be "channels_last", "channels_first" or None. '
            f"Received: data_format={data_format!r}"
        )
    return value


class Window(NamedTuple):
    """One spatial axis of a convolution; `padding` is (before, after) or "same"."""

    kernel: int
    stride: int
    dilation: int
    padding: str | tuple[int, int]

    @property
    def extent(self) -> int:
        """Input pixels from the first tap to the last."""
        return (self.kernel - 1) * self.dilation + 1

    def output_size(self, size: Any) -> Any:
        """Output positions along this axis; `size` is an int, a scalar tensor or None."""
        if size is None:
            return None
        if self.padding == "same":
            return (size + self.stride - 1) // self.stride
        before, after = cast(tuple[int, int], self.padding)
        return (size + before + after - self.extent) // self.stride + 1

    def pad_before(self, size: Any) -> Any:
        """Zero pixels before the first input pixel; "same" puts an odd pixel at the end."""
        if self.padding != "same":
            return self.padding[0]
        if self.stride == 1:
            return (self.extent - 1) // 2  # independent of the size
        total = (self.output_size(size) - 1) * self.stride + self.extent - size
        return (max(total, 0) if isinstance(total, int) else ops.maximum(total, 0)) // 2


class Geometry(NamedTuple):
    """The two windows of a 2-D convolution and how its channels are grouped."""

    rows: Window
    columns: Window
    groups: int
    offset_groups: int

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.rows.kernel * self.columns.kernel


def make_windows(
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    dilation_rate: tuple[int, int],
    padding: Padding,
) -> tuple[Window, Window]:
    """Returns the windows over rows and columns for standardized arguments."""
    words: dict[Any, Any] = {"valid": ((0, 0), (0, 0)), "same": ("same", "same")}
    per_axis = words.get(padding, padding)
    rows, columns = (
        Window(*axis) for axis in zip(kernel_size, strides, dilation_rate, per_axis, strict=True)
    )
    return rows, columns
