"""The operation of DCNv4 (the package `DCNv4` on PyPI, for CUDA only).

It sums the samples weighted by the mask: a depthwise convolution with a kernel of ones.
"""

import numpy as np

from problem import TAPS

VERSIONS = ("DCNv4", "torch")
_SIDE = 3
_WIDTH = -(-TAPS * 3 // 8) * 8  # of the tensor of offsets and masks; it must be a multiple of 8


def prepare(problem, mode, threads):
    import torch
    from DCNv4.functions import DCNv4Function

    arrays = problem.arrays
    inputs, packed, upstream = (
        torch.from_numpy(array).to("cuda")
        for array in (arrays["inputs"], pack(arrays["offsets"], arrays["mask"]), arrays["grad_output"])
    )
    # Of rows and columns: kernel, stride, padding, dilation.
    window = (_SIDE, _SIDE, 1, 1, 1, 1, 1, 1)
    # One group of all channels; offsets as they are; all images at once; with the tap in the middle.
    settings = (*window, 1, problem.channels, 1.0, problem.sizes[0], False)

    def forward():
        with torch.inference_mode():
            return [DCNv4Function.apply(inputs, packed, *settings)]

    leaves = [inputs.clone().requires_grad_(), packed.clone().requires_grad_()]

    def forward_backward():
        output = DCNv4Function.apply(*leaves, *settings)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    def collect(results):
        output, *gradients = (result.detach().cpu().numpy() for result in results)
        return [output, gradients[0], *unpack(gradients[1])] if gradients else [output]

    return (forward if mode == "forward" else forward_backward), collect


def pack(offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One tensor of offsets and masks, (N, H, W, 32): taps column by column, x before y, masks last."""
    grid = mask.shape[:3]
    by_tap = offsets.reshape(*grid, _SIDE, _SIDE, 2).swapaxes(3, 4)[..., ::-1]
    masks = mask.reshape(*grid, _SIDE, _SIDE).swapaxes(3, 4)
    packed = np.zeros((*grid, _WIDTH), mask.dtype)
    packed[..., : 2 * TAPS] = by_tap.reshape(*grid, 2 * TAPS)
    packed[..., 2 * TAPS : 3 * TAPS] = masks.reshape(*grid, TAPS)
    return packed


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: offsets and masks in the layout of keras_das."""
    grid = packed.shape[:3]
    by_tap = packed[..., : 2 * TAPS].reshape(*grid, _SIDE, _SIDE, 2)[..., ::-1].swapaxes(3, 4)
    masks = packed[..., 2 * TAPS : 3 * TAPS].reshape(*grid, _SIDE, _SIDE).swapaxes(3, 4)
    return by_tap.reshape(*grid, 2 * TAPS), masks.reshape(*grid, TAPS)
