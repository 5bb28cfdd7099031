"""Problems: shapes, tensors, and lower bounds of the work.

This module uses only NumPy, because it is imported in the environment of every contender.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

# "aggregation" is the operation of DCNv4: "depthwise" with a kernel of ones and without its gradient.
OPERATIONS = ("depthwise", "dense", "aggregation")
MODES = ("forward", "forward_backward")
DTYPES = ("float32", "float16")
# A gate's deformable convolution after each stage of a ResNet-50: eight images at 224x224, one at 640x640.
SHAPES = (
    "8x56x56x51",
    "8x28x28x102",
    "8x14x14x205",
    "8x7x7x410",
    "1x160x160x51",
    "1x80x80x102",
    "1x40x40x205",
    "1x20x20x410",
)
# The same for a training step of 64 images on a GPU. DCNv4 requires a multiple of eight channels.
GPU_SHAPES = {
    "depthwise": ("64x56x56x51", "64x28x28x102", "64x14x14x205", "64x7x7x410"),
    "dense": ("64x56x56x51", "64x28x28x102", "64x14x14x205", "64x7x7x410"),
    "aggregation": ("64x56x56x56", "64x28x28x104", "64x14x14x208", "64x7x7x416"),
}
TAPS = 9


@dataclass(frozen=True)
class Problem:
    """A modulated 3x3 deformable convolution: stride 1, same padding, one offset group, no bias.

    `shape` is the input's as text, "NxHxWxC". Tensors are NumPy arrays of one dtype in keras_das' layout.
    """

    operation: str
    shape: str
    dtype: str = "float32"

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors: the arguments, and the gradient for the output."""
        generator, shapes = np.random.default_rng(0), self.shapes
        # Odd multiples of 2^-11 (2^-7 for float16): no position is a whole pixel, where the gradient jumps,
        # and float32 holds every position exactly, so that all contenders read the same cells.
        steps = 1024 if self.dtype == "float32" else 64
        offsets = (np.floor(generator.normal(0, 2, shapes["offsets"]) * steps) + 0.5) / steps
        arrays = {
            "inputs": generator.standard_normal(shapes["inputs"]),
            "kernel": generator.standard_normal(shapes["kernel"]) / np.sqrt(TAPS * shapes["kernel"][2]),
            "offsets": offsets,
            "mask": generator.random(shapes["mask"]),
            "grad_output": generator.standard_normal(shapes["grad_output"]),
        }
        if self.operation == "aggregation":
            arrays["kernel"] = np.ones(shapes["kernel"])
        return {name: array.astype(self.dtype) for name, array in arrays.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes."""
        n, h, w, c = self.sizes
        return {
            "inputs": (n, h, w, c),
            "kernel": (3, 3, 1 if self.depthwise else c, self.filters),
            "offsets": (n, h, w, TAPS * 2),
            "mask": (n, h, w, TAPS),
            "grad_output": (n, h, w, self.filters),
        }

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        n, h, w, c = map(int, self.shape.split("x"))
        return n, h, w, c

    @property
    def depthwise(self) -> bool:
        return self.operation != "dense"

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The arguments whose gradients "forward_backward" returns."""
        kernel = () if self.operation == "aggregation" else ("kernel",)
        return ("inputs", *kernel, "offsets", "mask")

    @property
    def channels(self) -> int:
        return self.sizes[3]

    @property
    def filters(self) -> int:
        return self.channels * (1 if self.depthwise else 5)

    @property
    def groups(self) -> int:
        return self.channels if self.depthwise else 1

    def result_bytes(self, mode: str) -> int:
        """Size of what a run returns: the output, and the gradients with `forward_backward`."""
        output = self._bytes("grad_output")
        return output if mode == "forward" else output + self._input_bytes()

    def least_bytes(self, mode: str) -> int:
        """Bytes moved if each pass reads each of its inputs once and writes each of its results once."""
        output, inputs = self._bytes("grad_output"), self._input_bytes()
        forward = inputs + output
        backward = inputs + output + inputs
        return forward if mode == "forward" else forward + backward

    def multiply_adds(self, mode: str) -> int:
        """Multiply-adds of a pass that stores no samples, so that the backward pass samples again."""
        n, h, w, c = self.sizes
        samples = n * h * w * TAPS * c
        kernel = 1 if self.depthwise else self.filters
        forward = 4 + kernel  # four corners, then the kernel
        # Four corners each for the gradients of the kernel, of offsets and mask, and of the inputs.
        backward = 4 + 4 + 4 + 2 * kernel
        return samples * (forward if mode == "forward" else forward + backward)

    def _input_bytes(self) -> int:
        return self._bytes("inputs", "kernel", "offsets", "mask")

    def _bytes(self, *names: str) -> int:
        return sum(math.prod(self.shapes[name]) for name in names) * np.dtype(self.dtype).itemsize


def channels_first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def largest_error(results, expected) -> float:
    """The largest deviation of any tensor, relative to its largest value. A NaN anywhere gives NaN."""
    errors = [
        np.max(np.abs(np.asarray(result, np.float64) - right)) / np.max(np.abs(right))
        for result, right in zip(results, expected, strict=True)
    ]
    return float(np.max(errors))
