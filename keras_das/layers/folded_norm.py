"""The layer norm of equation 3 with few passes over the feature map: folded into the product before it.

Everything in this module is channels last.
"""

from typing import Any

from keras import ops

from keras_das.ops.pointwise import product

Tensor = Any

# The default of PyTorch's norms. Keras' default of 1e-3 would flatten feature maps of small variance.
EPSILON = 1e-5
# With more channels C', the quadratic form of the folded norm costs more than the norm itself.
_FOLDED_WIDTH = 128


def normalize(x: Tensor, scale: Tensor, shift: Tensor, norm: str, dtype: str) -> Tensor:
    """Returns the norm of x.

    Args:
        x: Tensor `(N, H, W, C)` of at least float32.
        scale: Tensor `(C,)`.
        shift: Tensor `(C,)`.
        norm: String. `"image"` or `"channels"`; see `DASLayer`.
        dtype: String. Dtype of the result.
    """
    x = _scale(x - ops.mean(x, axis=_axes(norm), keepdims=True), scale, norm, dtype)
    return x + ops.cast(shift, dtype)


def normalized_product(
    x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, norm: str, dtype: str
) -> Tensor:
    """Returns the norm of `x W`.

    If the mean over channels of each row of W is subtracted from W, the mean over channels of `x W` is 0.
    The variance of `x W` is then a quadratic form of the C' channels of x, with the matrix `W W^T / C`.
    If C' is small, the norm is folded into the product.

    Args:
        x: Tensor `(N, H, W, C')`.
        kernel: Tensor `(C', C)` of at least float32: W.
        scale: Tensor `(C,)`, like `kernel`.
        shift: Tensor `(C,)`, like `kernel`.
        norm: String. `"image"` or `"channels"`; see `DASLayer`.
        dtype: String. Dtype of the product and of the result.
    """
    if norm == "image":
        return _image_norm_of_product(ops.cast(x, kernel.dtype), kernel, scale, shift, dtype)
    kernel = kernel - ops.mean(kernel, axis=1, keepdims=True)
    if _folds(kernel):
        x = ops.cast(x, kernel.dtype)
        variance = ops.sum(product(x, _gram(kernel)) * x, axis=-1, keepdims=True)
        x = _product(x * _inverse_deviation(variance), kernel * scale, dtype)
    else:
        x = _scale(ops.cast(_product(x, kernel, dtype), kernel.dtype), scale, norm, dtype)
    return x + ops.cast(shift, dtype)


def _image_norm_of_product(x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, dtype: str) -> Tensor:
    """The norm of `x W` over each image.

    `x W` is split into two parts: the product with the deviation of x from its spatial mean, and the product
    with this mean, which is one vector per image. The squares of the parts add up, and neither part loses
    precision if x has a large common offset.
    """
    place = ops.mean(x, axis=(1, 2), keepdims=True)
    x = x - place
    # A matrix, so that exports know all shapes.
    common = ops.matmul(ops.squeeze(place, axis=(1, 2)), kernel - ops.mean(kernel, axis=1, keepdims=True))
    variance = ops.mean(ops.square(common), axis=-1, keepdims=True)
    common, variance = _at_each_place(common), _at_each_place(variance)
    if _folds(kernel):
        spread = ops.sum(product(x, _gram(kernel)) * x, axis=-1, keepdims=True)
        scaling = _inverse_deviation(variance + ops.mean(spread, axis=(1, 2), keepdims=True))
        x = _product(x * scaling, kernel * scale, dtype)
    else:
        x = ops.cast(_product(x, kernel, dtype), x.dtype)
        spread = ops.mean(ops.square(x), axis=(1, 2, 3), keepdims=True)
        scaling = _inverse_deviation(variance + spread)
        x = ops.cast(x * (scaling * scale), dtype)
    return x + ops.cast(common * scaling * scale + shift, dtype)


def _at_each_place(x: Tensor) -> Tensor:
    """Returns `(N, C)` as `(N, 1, 1, C)`."""
    return ops.expand_dims(ops.expand_dims(x, 1), 1)


def _scale(x: Tensor, scale: Tensor, norm: str, dtype: str) -> Tensor:
    """Scales x, which has mean 0, to the standard deviation `scale`."""
    variance = ops.mean(ops.square(x), axis=_axes(norm), keepdims=True)
    return ops.cast(x * (_inverse_deviation(variance) * scale), dtype)


def _axes(norm: str) -> tuple[int, ...]:
    return (1, 2, 3) if norm == "image" else (3,)


def _folds(kernel: Tensor) -> bool:
    width, channels = kernel.shape
    return width <= min(_FOLDED_WIDTH, channels / 2)


def _product(x: Tensor, kernel: Tensor, dtype: str) -> Tensor:
    return product(ops.cast(x, dtype), ops.cast(kernel, dtype))


def _gram(kernel: Tensor) -> Tensor:
    """`W W^T / C`. With it, the mean over channels of the squares of `x W` is a quadratic form of x."""
    return ops.matmul(kernel, ops.transpose(kernel)) / kernel.shape[1]


def _inverse_deviation(variance: Tensor) -> Tensor:
    return ops.rsqrt(ops.maximum(variance, 0) + EPSILON)  # rounding can make a variance negative
