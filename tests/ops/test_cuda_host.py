"""The CUDA kernels, run on the host: what they index, and what they compute.

A C++ compiler compiles them with tests/csrc/cuda_on_host.h, which runs the threads of a block one after
another. Only `make test-gpu` tests the rest: parallel threads, and the code of CUDA's compiler.
"""

import concurrent.futures
import subprocess

import numpy as np
import pytest

from keras_das.kernels import targets
from keras_das.kernels.compilers import NoCompiler, find_compiler
from tests.ops import random_cases
from tests.ops import test_borders as borders
from tests.ops.op_cases import (
    CASES,
    DTYPES,
    GRADIENT_BOUND,
    VALUE_BOUND,
    Case,
    assert_as_expected,
    draw,
    each_once_fast,
    expected,
    relative_error,
    split_upstream,
)
from tests.ops.plain_kernels import CSRC, INCLUDES, CudaKernelsOnHost, KernelError

UNITS = {
    "cuda/kernels.cu.cc": ("-x", "c++"),
    str(CSRC / "c_api.cc"): (),
    "deformable_conv2d.cc": (),
    "parallel.cc": (),
    "cpu/kernels.cc": ("-DKERAS_DAS_ISA=baseline", "-O0"),  # linked, and not run
}
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", '-DKERAS_DAS_CUDA="host"', *INCLUDES)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A library of the kernels for the host."""
    try:
        compiler = find_compiler()
    except NoCompiler as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cuda_on_host")

    objects = [str(folder / f"{number}.o") for number in range(len(UNITS))]

    def compile_one(unit, to):
        source = targets.SOURCES / unit
        subprocess.run([*compiler, *FLAGS, *UNITS[unit], "-c", str(source), "-o", to], check=True)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, UNITS, objects))
    subprocess.run([*compiler, "-shared", "-pthread", *objects, "-o", str(folder / "lib.so")], check=True)
    return folder / "lib.so"


@pytest.fixture
def kernels(path):
    return CudaKernelsOnHost(path)


def compute(kernels, case, tensors, **settings):
    for name, value in settings.items():
        setattr(kernels, name, value)
    return kernels.value_and_gradients(*split_upstream(tensors), **case.options)


def assert_same_bits(one, other, names=None):
    (outputs, gradients), (other_outputs, other_gradients) = one, other
    np.testing.assert_array_equal(outputs, other_outputs)
    for name in names or gradients:
        np.testing.assert_array_equal(gradients[name], other_gradients[name], err_msg=name)


def assert_both_variants_agree(rng, kernels, case, dtype):
    """The atomic one and the deterministic one."""
    tensors = draw(case, rng, dtype)
    oracles = expected(case, tensors)
    for deterministic in (False, True):
        results = compute(kernels, case, tensors, deterministic=deterministic, backwards=deterministic)
        assert_as_expected(case, tensors, dtype, *results, oracles)


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[number % 4]) for number, case in enumerate(CASES)], ids=str
)
def test_agrees_with_the_oracle(rng, kernels, case, dtype):
    assert_both_variants_agree(rng, kernels, case, dtype)


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.slow)])
def test_random_cases(rng, kernels, count):
    """With few blocks, little memory, and tensors at any address."""

    def run_one(arguments, upstream, threads, **options):
        kernels.deterministic, kernels.backwards = rng.random(2) < 0.5
        kernels.shift = int(rng.integers(3))
        kernels.most_blocks = int(rng.integers(1, 6))
        kernels.workspace_bytes = int(rng.choice([1, 500, 3000, 1 << 20]))
        return kernels.value_and_gradients(arguments, upstream, **options)

    random_cases.check(run_one, count, rng)


# What is taken at once: 32 threads of a warp, 256 of a block with up to two packs of channels each, 9 taps in
# registers, 256 and 144 entries in shared memory, tiles of 64 by 64 by 16 (squares of 16 by 16 by 8 in tensor
# cores), packs of up to 16 bytes.
BLOCKS = [
    Case("packs", image=(4, 5), channels=128, groups=128, filters=128, kernel_size=(1, 2), padding="same"),
    Case(
        "packs_of_two", image=(3, 4), channels=34, groups=34, filters=34, kernel_size=(3, 3), padding="same"
    ),
    Case("packs_dense", image=(3, 4), channels=64, filters=3, kernel_size=(2, 2), padding="same"),
    Case("channels", image=(3, 3), channels=521, groups=521, filters=521, kernel_size=(1, 2), padding="same"),
    Case(
        "channels_dense",
        image=(3, 2),
        batch=1,
        channels=1042,
        filters=2,
        kernel_size=(1, 2),
        padding="same",
        offset_groups=2,
    ),
    Case(
        "taps", batch=1, image=(3, 3), channels=2, groups=2, filters=2, kernel_size=(17, 17), padding="same"
    ),
    Case("taps_dense", batch=1, image=(3, 3), channels=2, filters=3, kernel_size=(17, 17), padding="same"),
    Case("pixels", image=(23, 21), channels=3, groups=3, filters=3, kernel_size=(1, 2), padding="same"),
    Case("filters", image=(9, 9), channels=5, filters=150, kernel_size=(2, 3), padding="same"),
    Case("groups", image=(5, 5), channels=21, groups=3, filters=201, kernel_size=(2, 2), padding="same"),
]


@pytest.mark.parametrize(
    ("case", "dtype"), each_once_fast(BLOCKS, ["float16", "float32", "float64"]), ids=str
)
def test_more_than_a_block(rng, kernels, case, dtype):
    assert_both_variants_agree(rng, kernels, case, dtype)


@pytest.mark.parametrize("case", BLOCKS[:3], ids=str)
def test_unaligned_tensors_give_the_same_outputs(rng, kernels, case):
    tensors = draw(case, rng)
    aligned, _ = compute(kernels, case, tensors)
    outputs, gradients = compute(kernels, case, tensors, shift=1)
    np.testing.assert_array_equal(outputs, aligned)
    assert_as_expected(case, tensors, "float32", outputs, gradients)


@pytest.mark.parametrize(("dtype", "deterministic"), [("float16", True), ("bfloat16", False)])
def test_16_bit_products_lose_nothing(rng, kernels, dtype, deterministic):
    """Tensor cores have fewer digits than a float, and sums must not show it."""
    case = Case("", image=(9, 8), channels=18, filters=70, groups=2, padding="same", use_bias=False)
    tensors = draw(case, rng, dtype)
    # What is given as floats has its gradient given back as such.
    for name in ("kernel", "offsets", "mask"):
        tensors[name] = tensors[name].astype("float32")
    _, gradients = compute(kernels, case, tensors, deterministic=deterministic)
    _, wanted = expected(case, tensors)
    for name in ("kernel", "offsets", "mask"):
        assert relative_error(gradients[name], wanted[name]) < 2e-6, name


DEPTHWISE = Case(
    "depthwise", batch=3, image=(4, 5), channels=6, groups=6, filters=6, padding="same", offset_groups=2
)
DENSE = Case("dense", batch=3, image=(4, 5), channels=6, groups=2, filters=8, padding="same", offset_groups=3)


def crowded(case, rng):
    """Tensors of which many samples read the same few pixels."""
    tensors = draw(case, rng)
    tensors["offsets"][:] = np.round(tensors["offsets"] / 2)
    return tensors


@pytest.mark.parametrize("case", [DEPTHWISE, DENSE], ids=str)
def test_any_order_of_threads_gives_the_same_bits(rng, kernels, case):
    tensors = crowded(case, rng)
    one = compute(kernels, case, tensors, deterministic=True)
    assert_same_bits(compute(kernels, case, tensors, backwards=True), one)
    atomic = compute(kernels, case, tensors, deterministic=False)
    others = [name for name in one[1] if name != "inputs"]
    assert_same_bits(atomic, one, others)
    again = compute(kernels, case, tensors, backwards=False)
    assert_same_bits(again, one, others)
    assert np.any(again[1]["inputs"] != atomic[1]["inputs"])  # or this test would see nothing


@pytest.mark.parametrize("case", [DEPTHWISE, DENSE], ids=str)
def test_any_number_of_blocks_gives_the_same_bits(rng, kernels, case):
    tensors = crowded(case, rng)
    one = compute(kernels, case, tensors, deterministic=True)
    for most in (1, 2):
        assert_same_bits(compute(kernels, case, tensors, most_blocks=most), one)


@pytest.mark.parametrize("case", [DEPTHWISE, DENSE], ids=str)
def test_an_image_does_not_depend_on_the_batch(rng, kernels, case):
    tensors = crowded(case, rng)
    outputs, gradients = compute(kernels, case, tensors, deterministic=True, workspace_bytes=40_000)
    alone = {name: a if name in ("kernel", "bias") else a[1:2] for name, a in tensors.items()}
    alone_outputs, alone_gradients = compute(kernels, case, alone)
    np.testing.assert_array_equal(alone_outputs[0], outputs[1])
    for name in ("inputs", "offsets", "mask"):
        np.testing.assert_array_equal(alone_gradients[name][0], gradients[name][1], err_msg=name)


@pytest.mark.parametrize("case", [DEPTHWISE, DENSE], ids=str)
def test_working_memory_is_bounded(rng, kernels, case):
    tensors = crowded(case, rng)
    oracles = expected(case, tensors)
    # What one pixel and one image's cells need, and a part of the sums, there is always.
    least = 4 * 9 * case.channels * max(case.filters, 8) + 8 * 2 * case.offset_groups * 5 * 6
    for most, deterministic in ((1, True), (5000, False), (40_000, True)):
        results = compute(kernels, case, tensors, deterministic=deterministic, workspace_bytes=most)
        assert_as_expected(case, tensors, "float32", *results, oracles)
        assert 0 < kernels.taken["backward"] <= 4 * most + 4 * least
        assert kernels.taken["forward"] <= most + least


def test_no_memory_is_an_error(rng, kernels):
    with pytest.raises(KernelError, match="out of memory"):
        compute(kernels, DENSE, draw(DENSE, rng), memory=100)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_borders(rng, kernels, deterministic):
    tensors = borders.grid_tensors(rng)
    outputs, gradients = compute(kernels, borders.GRID, tensors, deterministic=deterministic)
    assert_as_expected(borders.GRID, tensors, "float64", outputs, gradients)
    off = borders.off_image()
    np.testing.assert_array_equal(outputs[0][off], np.broadcast_to(tensors["bias"], (off.sum(), 2)))
    for name in ("offsets", "mask"):
        np.testing.assert_array_equal(gradients[name][0][off], 0)


@pytest.mark.parametrize(
    ("dtype", "deterministic"), [("bfloat16", True), ("float32", False), ("float64", True)]
)
def test_far_away_is_zero(rng, kernels, dtype, deterministic):
    case = Case("", image=(9, 9), kernel_size=(1, 2), offset_groups=2)
    tensors = draw(case, rng, dtype)
    far = rng.uniform(size=tensors["offsets"].shape) < 0.3
    tensors["offsets"][far] = rng.choice(borders.FAR, size=far.sum())
    results = compute(kernels, case, tensors, deterministic=deterministic)
    assert_as_expected(case, tensors, dtype, *results)


@pytest.mark.parametrize(("groups", "deterministic"), [(4, False), (1, True)], ids=["depthwise", "dense"])
def test_nan_offsets_give_nan_there_and_nowhere_else(rng, kernels, groups, deterministic):
    case = Case("", channels=4, filters=4, groups=groups, offset_groups=2, kernel_size=(1, 2))
    tensors = draw(case, rng)
    for index in ((0, 0, 0, 0), (0, 2, 3, 1), (1, 1, 1, 7), (1, 4, 2, 4)):
        tensors["offsets"][index] = np.nan
    tensors["offsets"][0, 0, 0, 1] = 1e30
    outputs, gradients = compute(kernels, case, tensors, deterministic=deterministic)
    wanted, _ = expected(case, tensors)
    np.testing.assert_array_equal(np.isnan(outputs), np.isnan(wanted))
    np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-5)
    for name in ("inputs", "bias"):
        assert np.all(np.isfinite(gradients[name])), name
    hurt = np.isnan(wanted).any(-1)
    for name in ("offsets", "mask"):
        assert np.all(np.isfinite(gradients[name][~hurt])), name


@pytest.mark.parametrize(
    ("dtype", "bad", "deterministic"),
    [("float16", np.inf, True), ("float32", np.nan, True), ("float64", np.inf, False)],
)
def test_bad_pixels_stay_where_they_are_read(rng, kernels, dtype, bad, deterministic):
    case = Case("", image=(5, 6), channels=2, filters=2, kernel_size=(1, 2), padding="same")
    tensors = draw(case, rng, dtype)
    # Between pixels, in float16 too: at a pixel, others have a weight of 0.
    tensors["offsets"] = np.floor(tensors["offsets"]) + rng.choice([0.25, 0.5], tensors["offsets"].shape)
    tensors["offsets"] = tensors["offsets"].astype(dtype)
    for row, column in ((0, 0), (0, 5), (4, 0), (4, 5), (2, 2)):
        tensors["inputs"][:, row, column] = bad
    outputs, gradients = compute(kernels, case, tensors, deterministic=deterministic)
    with np.errstate(invalid="ignore"):
        wanted, wanted_gradients = expected(case, tensors)
    borders.compare_where_finite(outputs, wanted, "outputs", VALUE_BOUND[dtype])
    if np.isinf(bad):
        np.testing.assert_array_equal(np.isinf(outputs), np.isinf(wanted))
    for name in ("inputs", "offsets", "mask"):
        borders.compare_where_finite(gradients[name], wanted_gradients[name], name, GRADIENT_BOUND[dtype])
