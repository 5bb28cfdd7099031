"""`deformops.registry.conv`: Triton kernels on a GPU."""

from deformops.registry import conv

from contenders import torch_run
from problem import TAPS

VERSIONS = ("deformops", "torch", "triton")


def prepare(problem, mode, threads):
    grid = problem.sizes[:3]

    def convolve(inputs, kernel, offsets, mask):
        return conv(
            inputs,
            offsets.view(*grid, 1, TAPS, 2),  # one offset group
            kernel,
            mask=mask.view(*grid, 1, TAPS),
            padding=1,
            groups=problem.groups,
        )

    return torch_run.prepare(problem, mode, threads, convolve, first=False)
