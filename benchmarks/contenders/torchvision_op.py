"""`torchvision.ops.deform_conv2d`."""

import torch
from torchvision.ops import deform_conv2d

from problem import channels_first, channels_last

VERSIONS = ("torchvision", "torch")


def prepare(problem, mode, threads):
    torch.set_num_threads(threads)
    arrays = problem.arrays
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, offsets, mask, upstream = (
        torch.from_numpy(channels_first(arrays[name])).to(device)
        for name in ("inputs", "offsets", "mask", "grad_output")
    )
    kernel = torch.from_numpy(arrays["kernel"].transpose(3, 2, 0, 1).copy()).to(device)

    def forward():
        with torch.inference_mode():
            return [deform_conv2d(inputs, offsets, kernel, padding=1, mask=mask)]

    leaves = [tensor.clone().requires_grad_() for tensor in (inputs, kernel, offsets, mask)]

    def forward_backward():
        inputs, kernel, offsets, mask = leaves
        output = deform_conv2d(inputs, offsets, kernel, padding=1, mask=mask)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    return (forward if mode == "forward" else forward_backward), _collect


def _collect(results):
    arrays = [result.detach().cpu().numpy() for result in results]
    is_kernel = [place == 2 for place in range(len(arrays))]
    return [
        array.transpose(2, 3, 1, 0) if kernel else channels_last(array)
        for array, kernel in zip(arrays, is_kernel, strict=True)
    ]
