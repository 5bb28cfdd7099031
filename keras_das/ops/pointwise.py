"""The product of a feature map with a matrix over its channels: a pointwise convolution."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from keras import ops

Tensor = Any

_as_convolutions: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_das_as_convolutions", default=False
)


@contextlib.contextmanager
def as_convolutions() -> Iterator[None]:
    """Context manager: this thread traces products as convolutions, for exports.

    In channels-first formats, a matrix product over channels requires transposes of the feature map. In
    LiteRT, it computes shapes, which disables the fast kernels. Elsewhere, it is at least as fast as a
    convolution, and it is correct for empty batches, unlike TensorFlow's oneDNN convolution (2.21).
    """
    token = _as_convolutions.set(True)
    try:
        yield
    finally:
        _as_convolutions.reset(token)


def traces_convolutions() -> bool:
    """Whether this thread is in the context `as_convolutions`."""
    return _as_convolutions.get()


def product(x: Tensor, kernel: Tensor) -> Tensor:
    """Returns `x kernel`.

    Args:
        x: Tensor `(N, H, W, C')`.
        kernel: Tensor `(C', C)` of the dtype of `x`.
    """
    if traces_convolutions():
        return ops.conv(x, kernel[None, None], padding="valid", data_format="channels_last")
    return ops.matmul(x, kernel)
