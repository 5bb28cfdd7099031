"""Depthwise convolution of the gate, with workarounds for XLA on CPUs and for empty batches."""

from typing import Any

import keras
from keras import ops

from keras_das.ops import native

Tensor = Any


class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with two differences.

    In programs that XLA compiles for a CPU, the layer sums shifted copies of the input, because an ordinary
    depthwise convolution is many times slower there than outside XLA. The gradient of the kernel is 0 for an
    empty batch. Supports stride 1, `padding="same"`, one filter per channel and channels last, without bias
    and activation.
    """

    def call(self, inputs: Tensor) -> Tensor:
        """Convolves the input, with the arguments and the result of Keras' layer."""
        if native.xla_compiles_for_cpu():
            return depthwise_by_shifts(inputs, self.kernel[..., 0])
        kernel = _zero_gradient_if_empty(ops.convert_to_tensor(self.kernel), ops.shape(inputs)[0])
        return ops.depthwise_conv(inputs, kernel, padding=self.padding, data_format=self.data_format)


def _zero_gradient_if_empty(kernel: Tensor, batch: Any) -> Tensor:
    """Returns the kernel. Its gradient is 0 if the batch is empty.

    TensorFlow (2.21, on CPUs without AVX-512) returns uninitialized memory as the gradient in this case.
    """
    if isinstance(batch, int) and batch > 0:
        return kernel

    @ops.custom_gradient
    def guard(kernel: Tensor) -> tuple[Tensor, Any]:
        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            grad_output = args[0] if upstream is None else upstream
            return ops.where(ops.greater(batch, 0), grad_output, ops.zeros_like(grad_output))

        return kernel, gradient

    return guard(kernel)


def depthwise_by_shifts(inputs: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution with stride 1 and same padding, as a weighted sum of shifted copies of the input.

    Sums are at least float32.

    Args:
        inputs: `(N, H, W, C)`.
        kernel: `(kh, kw, C)`.

    Returns:
        `(N, H, W, C)` in the dtype of the inputs.
    """
    size = tuple(kernel.shape[:2])
    before = tuple((extent - 1) // 2 for extent in size)
    after = tuple(extent - 1 - margin for extent, margin in zip(size, before, strict=True))
    dtype = keras.backend.result_type(inputs.dtype, "float32")

    @ops.custom_gradient
    def convolve(inputs: Tensor, kernel: Tensor) -> tuple[Tensor, Any]:
        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
            grad_output = args[0] if upstream is None else upstream
            flipped = ops.flip(ops.flip(kernel, axis=0), axis=1)  # Keras 3.13 and older flip one axis
            grad_inputs = _correlate(grad_output, flipped, after, before)
            products = [shifted * grad_output for shifted in _shifts(inputs, size, before, after)]
            # Sum over the batch first: XLA is slow if it sums over all three axes at once.
            by_pixel = ops.stack([ops.sum(product, axis=0) for product in products])
            return grad_inputs, ops.reshape(ops.sum(by_pixel, axis=(1, 2)), kernel.shape)

        return _correlate(inputs, kernel, before, after), gradient

    output = convolve(ops.cast(inputs, dtype), ops.cast(kernel, dtype))
    return ops.cast(output, inputs.dtype)


def _correlate(x: Tensor, kernel: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    size = tuple(kernel.shape[:2])
    weights = ops.reshape(kernel, (-1, kernel.shape[2]))
    return sum(shifted * weights[tap] for tap, shifted in enumerate(_shifts(x, size, before, after)))


def _shifts(
    x: Tensor, size: tuple[int, int], before: tuple[int, int], after: tuple[int, int]
) -> list[Tensor]:
    """x shifted by the distance of each tap, row by row, with zeros beyond its edges."""
    height, width = ops.shape(x)[1:3]
    padded = ops.pad(x, ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)))
    return [
        padded[:, row : row + height, column : column + width]
        for row in range(size[0])
        for column in range(size[1])
    ]
