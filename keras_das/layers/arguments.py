"""Checks of the layers' arguments that are not the operation's."""

import math
from collections.abc import Collection
from typing import Any


def standardize_positive(value: Any, name: str) -> float:
    """The value, if it is a finite number above 0."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
    return value


def standardize_factor(value: Any, name: str) -> float:
    """The value, if it is a finite number of at least 0."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a number of at least 0. Received: {name}={value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def standardize_choice(value: Any, name: str, choices: Collection[str]) -> str:
    """The value, if it is one of the choices."""
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be {listed}. Received: {name}={value!r}")
    return value
