"""Tests of the peak memory of forward and backward passes, measured in subprocesses."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux' /proc"
    ),
]

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",  # freed tensors are returned to the system immediately
    "TF_ENABLE_ONEDNN_OPTS": "0",  # its allocator keeps freed memory
}


def measure(implementation, *measurements):
    """Returns the size in bytes of the peak and each tensor, for each (mode, side of the kernel, passes).

    A fourth number is the number of filters per channel.
    """
    words = [",".join(map(str, (*each, 1)[:4])) for each in measurements]
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.memory_probe", implementation, *words],
        env={**os.environ, **ENVIRONMENT},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(measurements, json.loads(result.stdout), strict=True))


@pytest.fixture(scope="module")
def of_reference():
    return measure("reference", *itertools.product(["eager", "graph", "xla"], [3, 5], ["both"]))


@pytest.fixture(scope="module")
def of_kernels(kernels):
    modes = [("eager", 3, "forward"), ("xla", 3, "forward"), ("eager", 3, "both"), ("eager", 3, "both", 2)]
    return measure("native", *modes)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_peak_is_a_small_multiple_of_the_tensors(of_reference, mode):
    sizes = of_reference[mode, 3, "both"]
    tensors = sum(sizes[name] for name in ("inputs", "offsets", "mask", "outputs"))
    assert tensors < sizes["peak"] < 12 * tensors, f"{sizes['peak'] / tensors:.1f} times the tensors"


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_peak_does_not_grow_with_the_taps(of_reference, mode):
    """The peak grows only by the offsets, the mask, their gradients, and one working copy."""
    small, large = of_reference[mode, 3, "both"], of_reference[mode, 5, "both"]
    more = sum(large[name] - small[name] for name in ("offsets", "mask"))
    growth = (large["peak"] - 3 * more) / small["peak"]
    assert growth < 1.3, f"{growth:.2f} times the peak of 3x3"


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_kernels_store_no_columns(of_kernels, mode):
    """A forward pass uses less than 8 MiB besides its result. Nine samples per pixel would use 46 MB."""
    sizes = of_kernels[mode, 3, "forward"]
    assert sizes["outputs"] <= sizes["peak"] < sizes["outputs"] + 8 * 2**20


@pytest.mark.parametrize("multiplier", [(), (2,)], ids=["depthwise", "many_groups"])
def test_kernels_gradients_are_all_that_grows(of_kernels, multiplier):
    sizes = of_kernels["eager", 3, "both", *multiplier]
    results = sum(sizes[name] for name in sizes if name != "peak")
    assert results <= sizes["peak"] < results + 16 * 2**20
