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

    tensors = {"inputs": inputs, "kernel": kernel, "offsets": offsets, "mask": mask}
    leaves = {
        name: tensor.clone().requires_grad_(name in problem.differentiated)
        for name, tensor in tensors.items()
    }

    def forward_backward():
        output = deform_conv2d(
            leaves["inputs"], leaves["offsets"], leaves["kernel"], padding=1, mask=leaves["mask"]
        )
        sources = [leaves[name] for name in problem.differentiated]
        return [output, *torch.autograd.grad(output, sources, upstream)]

    def collect(results):
        names = ("output", *problem.differentiated)[: len(results)]
        return [_in_our_layout(name, result) for name, result in zip(names, results, strict=True)]

    return (forward if mode == "forward" else forward_backward), collect


def _in_our_layout(name, result):
    array = result.detach().cpu().numpy()
    return array.transpose(2, 3, 1, 0) if name == "kernel" else channels_last(array)
