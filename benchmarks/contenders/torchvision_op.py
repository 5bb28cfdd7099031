"""`torchvision.ops.deform_conv2d`."""

from torchvision.ops import deform_conv2d

from contenders import torch_run

VERSIONS = ("torchvision", "torch")


def prepare(problem, mode, threads):
    def convolve(inputs, kernel, offsets, mask):
        return deform_conv2d(inputs, offsets, kernel, padding=1, mask=mask)

    return torch_run.prepare(problem, mode, threads, convolve)
