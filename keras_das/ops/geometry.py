"""Window arithmetic: sizes of outputs, and positions of the kernel's taps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from keras import ops

Padding = str | tuple[tuple[int, int], tuple[int, int]]


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


def batch_inferred(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a shape to reshape to, with -1 for the batch size if it is the only unknown size.

    Exported graphs then compute no shapes, and LiteRT knows them all before it runs.
    """
    batch, *rest = shape
    inferred = not isinstance(batch, int) and all(isinstance(size, int) for size in rest)
    return (-1 if inferred else batch, *rest)


@functools.lru_cache
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
