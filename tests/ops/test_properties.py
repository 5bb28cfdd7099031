"""Property-based tests of the op with Hypothesis: any geometry and offsets agree with the oracle."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.op_cases import Case, assert_as_expected, draw
from tests.ops.tf_harness import run

SIDES = st.tuples(st.integers(0, 2), st.integers(0, 2))


@st.composite
def geometries(draw_from):
    """A case with a kernel that fits into the padded image."""
    groups, offset_groups = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 3))
    channels = groups * offset_groups * draw_from(st.integers(1, 2))
    kernel_size = draw_from(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation_rate = draw_from(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    reach = [(taps - 1) * rate + 1 for taps, rate in zip(kernel_size, dilation_rate, strict=True)]
    padding = draw_from(st.one_of(st.sampled_from(["valid", "same"]), st.tuples(SIDES, SIDES)))
    return Case(
        "",
        batch=draw_from(st.integers(0, 2)),
        image=tuple(draw_from(st.integers(1 if padding == "same" else least, least + 2)) for least in reach),
        channels=channels,
        filters=groups * draw_from(st.integers(1, 2)),
        kernel_size=kernel_size,
        groups=groups,
        strides=draw_from(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation_rate=dilation_rate,
        offset_groups=offset_groups,
        modulated=draw_from(st.booleans()),
        use_bias=draw_from(st.booleans()),
    )


# Whole and half pixels and borders, which random numbers miss, and positions far out of bounds.
OFFSETS = st.sampled_from([-1e9, -3.0, -1.0, -0.75, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.5, 1e9])


GIVEN = {
    "case": geometries(),
    "offsets": st.lists(OFFSETS, min_size=1, max_size=12),
    "data_format": st.sampled_from(["channels_last", "channels_first"]),
    "seed": st.integers(0, 2**32 - 1),
}
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    # The fixture returns the name of an implementation, which all examples may share.
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


def check_geometry(implementation, case, offsets, data_format, seed):
    rng = np.random.default_rng(seed)
    tensors = draw(case, rng, "float64")
    tensors["offsets"][:] = rng.choice(offsets, size=tensors["offsets"].shape)
    results = run(case, tensors, data_format=data_format, implementation=implementation)
    assert_as_expected(case, tensors, "float64", *results)


@settings(max_examples=10, **SETTINGS)
@given(**GIVEN)
def test_some_geometries(implementation, **example):
    check_geometry(implementation, **example)


@pytest.mark.slow
@settings(max_examples=40, **SETTINGS)
@given(**GIVEN)
def test_any_geometry(implementation, **example):
    check_geometry(implementation, **example)
