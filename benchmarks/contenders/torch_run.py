"""How the contenders written in torch run: on its GPU where it has one."""

import torch

from problem import channels_first, channels_last

_WITH_CHANNELS = ("inputs", "offsets", "mask", "grad_output", "output")


def prepare(problem, mode, threads, convolve, first=True):
    """`run` and `collect` for `convolve(inputs, kernel, offsets, mask)`, with the kernel as torch has it.

    `first` says whether the other tensors have their channels first.
    """
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {
        name: torch.from_numpy(_to_torch(name, array, first)).to(device)
        for name, array in problem.arrays.items()
    }
    upstream = tensors.pop("grad_output")

    def forward():
        with torch.inference_mode():
            return [convolve(**tensors)]

    leaves = {
        name: tensor.clone().requires_grad_(name in problem.differentiated)
        for name, tensor in tensors.items()
    }

    def forward_backward():
        output = convolve(**leaves)
        sources = [leaves[name] for name in problem.differentiated]
        return [output, *torch.autograd.grad(output, sources, upstream)]

    def collect(results):
        names = ("output", *problem.differentiated)[: len(results)]
        arrays = [result.detach().cpu().numpy() for result in results]
        return [_from_torch(name, array, first) for name, array in zip(names, arrays, strict=True)]

    return (forward if mode == "forward" else forward_backward), collect


def _to_torch(name, array, first):
    if name == "kernel":
        return array.transpose(3, 2, 0, 1).copy()
    return channels_first(array) if first and name in _WITH_CHANNELS else array


def _from_torch(name, array, first):
    if name == "kernel":
        return array.transpose(2, 3, 1, 0)
    return channels_last(array) if first else array
