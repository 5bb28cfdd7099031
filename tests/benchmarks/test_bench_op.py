"""Tests of bench_op.py: problems and contenders."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import bench_op
import numpy as np
import pytest
from contenders import dcnv4_op

FOLDER = pathlib.Path(bench_op.__file__).parent


@pytest.mark.slow
def test_from_start_to_tables(tmp_path):
    """A contender is compared with the oracle before it is timed. A missing contender is reported."""
    output = tmp_path / "op.json"
    command = [
        *(sys.executable, str(FOLDER / "bench_op.py"), "--op", "aggregation", "--shapes", "2x5x6x8"),
        *("--contenders", "reference-graph,dcnv4,reference-eager", "--repetitions", "1", "--no-memory"),
        *("--output", str(output)),
    ]
    # Without a compiler, the benchmark skips the slow measurement of the machine's peak performance.
    environment = {**os.environ, "CC": "no-compiler", "KERAS_DAS_BENCHMARK_ENVS": str(tmp_path)}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(output.read_text())
    assert found["missing"].keys() == {"dcnv4"}
    assert "benchmarks/environments.sh dcnv4" in found["missing"]["dcnv4"]
    timed = [
        (cell["op"], cell["mode"], cell["contender"]) for cell in found["cells"] if cell["milliseconds"] > 0
    ]
    contenders, modes = ("reference-graph", "reference-eager"), ("forward", "forward_backward")
    assert timed == list(itertools.product(["aggregation"], modes, contenders))
    assert "### aggregation, forward and backward, batch 2" in printed


def test_offsets_and_masks_as_dcnv4_has_them(rng):
    offsets, mask = rng.normal(size=(2, 3, 4, 18)), rng.normal(size=(2, 3, 4, 9))
    packed = dcnv4_op.pack(offsets, mask)
    assert packed.shape == (2, 3, 4, 32)
    for row in range(3):
        for column in range(3):
            ours, theirs = row * 3 + column, column * 3 + row
            np.testing.assert_array_equal(packed[..., 2 * theirs], offsets[..., 2 * ours + 1])  # x
            np.testing.assert_array_equal(packed[..., 2 * theirs + 1], offsets[..., 2 * ours])
            np.testing.assert_array_equal(packed[..., 18 + theirs], mask[..., ours])
    np.testing.assert_array_equal(packed[..., 27:], 0)
    for before, after in zip((offsets, mask), dcnv4_op.unpack(packed), strict=True):
        np.testing.assert_array_equal(before, after)
