"""Peak memory of one forward and backward pass, each measured in a process of its own."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux' /proc"
)

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",  # freed tensors go back to the system at once
    "TF_ENABLE_ONEDNN_OPTS": "0",  # its allocator would keep them
}


@functools.cache
def measure(mode, side, *how):
    """Bytes of the peak and of each tensor, for a kernel of side x side taps."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.memory_probe", mode, str(side), *how],
        env={**os.environ, **ENVIRONMENT},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_peak_is_a_small_multiple_of_the_tensors(mode):
    sizes = measure(mode, 3)
    tensors = sum(sizes[name] for name in ("inputs", "offsets", "mask", "outputs"))
    assert tensors < sizes["peak"] < 12 * tensors, f"{sizes['peak'] / tensors:.1f} times the tensors"


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_peak_does_not_grow_with_the_taps(mode):
    """But for offsets and mask themselves, their gradients and one working copy."""
    small, large = measure(mode, 3), measure(mode, 5)
    more = sum(large[name] - small[name] for name in ("offsets", "mask"))
    growth = (large["peak"] - 3 * more) / small["peak"]
    assert growth < 1.3, f"{growth:.2f} times the peak of 3x3"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_kernels_store_no_columns(mode):
    """Beyond its result a forward pass takes less than 8 MiB; nine samples a pixel would be 46 MB."""
    sizes = measure(mode, 3, "native", "forward")
    assert sizes["outputs"] <= sizes["peak"] < sizes["outputs"] + 8 * 2**20


@pytest.mark.usefixtures("kernels")
def test_kernels_gradients_are_all_that_grows():
    sizes = measure("eager", 3, "native")
    results = sum(sizes[name] for name in sizes if name not in ("peak",))
    assert results <= sizes["peak"] < results + 16 * 2**20
