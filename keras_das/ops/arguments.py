"""Validation of arguments, for the operation and the layers."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import keras
import numpy as np

from keras_das.ops.geometry import Padding

IMPLEMENTATIONS = ("auto", "native", "reference")


class Settings(NamedTuple):
    """The standardized arguments of `deformable_conv2d`, apart from its tensors."""

    strides: tuple[int, int]
    padding: Padding
    dilation_rate: tuple[int, int]
    offset_groups: int
    data_format: str
    implementation: str


def standardize_settings(
    strides: int | Sequence[int],
    padding: Any,
    dilation_rate: int | Sequence[int],
    offset_groups: int,
    data_format: str | None,
    implementation: str,
) -> Settings:
    """Returns the settings, or raises a ValueError that names the invalid argument."""
    return Settings(
        standardize_pair(strides, "strides"),
        standardize_padding(padding),
        standardize_pair(dilation_rate, "dilation_rate"),
        standardize_count(offset_groups, "offset_groups"),
        standardize_data_format(data_format),
        standardize_implementation(implementation),
    )


def _as_integer(value: Any) -> int | None:
    """Returns `value` as a Python integer if it is an integer, including NumPy's; otherwise `None`."""
    if isinstance(value, bool | np.bool_):  # NumPy 2.1 and older accept theirs as an index
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def standardize_count(value: int, name: str) -> int:
    """Returns `value` if it is a positive integer, or raises an error that names the argument."""
    count = _as_integer(value)
    if count is None or count < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return count


def standardize_positive(value: float, name: str) -> float:
    """Returns `value` as a float if it is a positive number, or raises an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
    return float(value)


def standardize_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Returns `value` as a pair of positive integers, or raises an error that names the argument."""
    single = _as_integer(value)
    values = value if isinstance(value, Sequence | np.ndarray) else ()
    pair = (single, single) if single is not None else tuple(_as_integer(v) for v in values)
    if len(pair) != 2 or any(v is None or v < 1 for v in pair):
        raise ValueError(f"`{name}` must be a positive integer or a pair of them. Received: {name}={value!r}")
    return cast(tuple[int, int], pair)


def standardize_padding(padding: Any) -> Padding:
    """Returns "valid", "same" or a pair of pairs of non-negative integers, or raises a ValueError."""
    if isinstance(padding, str) and padding.lower() in ("valid", "same"):
        return padding.lower()
    try:
        (top, bottom), (left, right) = padding
        pads = [_as_integer(p) for p in (top, bottom, left, right)]
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


def standardize_implementation(implementation: str) -> str:
    """Returns the name of an implementation, or raises a ValueError."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be one of {IMPLEMENTATIONS}. Received: implementation={implementation!r}"
        )
    return implementation
