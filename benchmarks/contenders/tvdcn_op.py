"""`tvdcn.ops.deform_conv2d`, torchvision's operation by other kernels."""

from tvdcn.ops import deform_conv2d

from contenders import torch_run

VERSIONS = ("tvdcn", "torch")


def prepare(problem, mode, threads):
    def convolve(inputs, kernel, offsets, mask):
        # Its schema has lists of two.
        return deform_conv2d(
            inputs, kernel, offsets, mask, None, (1, 1), (1, 1), (1, 1), groups=problem.groups
        )

    return torch_run.prepare(problem, mode, threads, convolve)
