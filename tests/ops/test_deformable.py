"""Tests of the op: agreement with the oracle, and with ordinary convolutions for zero offsets."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import oracle
from tests.ops.op_cases import (
    CASES,
    COMPILED_CASES,
    DATA_FORMATS,
    DTYPES,
    GRADIENT_BOUND,
    HALF_ULP,
    IMPLEMENTATIONS,
    VALUE_BOUND,
    Case,
    assert_as_expected,
    call,
    draw,
    in_turns,
    numpy_dtype,
    relative_error,
    split_upstream,
)
from tests.ops.tf_harness import run, runner, tensors_of, value_and_gradients


@pytest.mark.parametrize(("case", "dtype", "data_format"), in_turns(CASES), ids=str)
def test_values_and_gradients(rng, case, dtype, data_format, implementation):
    tensors = draw(case, rng, dtype)
    outputs, gradients = run(case, tensors, data_format=data_format, implementation=implementation)
    assert outputs.dtype == numpy_dtype(dtype)
    assert_as_expected(case, tensors, dtype, outputs, gradients)


@pytest.mark.parametrize("count", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_random_choices(rng, count, implementation):
    """Covers other combinations of case, dtype, and data format than the test above."""
    for _ in range(count):
        of = (CASES, DTYPES, DATA_FORMATS)
        case, dtype, data_format = (choices[rng.integers(len(choices))] for choices in of)
        tensors = draw(case, rng, dtype)
        print(case, dtype, data_format)  # pytest shows this if the test fails
        results = run(case, tensors, data_format=data_format, implementation=implementation)
        assert_as_expected(case, tensors, dtype, *results)


def compiled_choices():
    """Cycles through the modes too, so that both modes cover every dtype and data format."""
    for number, choice in enumerate(in_turns(COMPILED_CASES)):
        mode = ("graph", "xla")[(number + number // 4) % 2]
        for implementation in IMPLEMENTATIONS:
            # XLA takes seconds to compile a case of the reference.
            is_slow = (mode, implementation) == ("xla", "reference") and number > 4
            yield pytest.param(*choice, mode, implementation, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(
    ("case", "dtype", "data_format", "mode", "implementation"),
    list(compiled_choices()),
    ids=str,
    indirect=["implementation"],
)
def test_compiled(rng, case, dtype, data_format, mode, implementation):
    tensors = draw(case, rng, dtype)
    results = run(case, tensors, mode, data_format, implementation)
    assert_as_expected(case, tensors, dtype, *results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("same", "depthwise", "groups2")], ids=str
)
def test_half_types(rng, case, dtype, implementation):
    """The error is at most twice that of computing entirely in half precision."""
    tensors = draw(case, rng, dtype)
    arguments, _ = split_upstream(tensors)
    outputs = call(tensors_of(arguments), case, implementation=implementation)
    exact = oracle.deformable_conv2d(**arguments, **case.options)
    naive = oracle.naive_lowprec(**arguments, **case.options, dtype=numpy_dtype(dtype))
    assert relative_error(outputs, exact) <= max(2 * relative_error(naive, exact), HALF_ULP[dtype])


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_subnormal_numbers(rng, mode, implementation):
    """Below 2^-14, the numbers of float16 are subnormal. Gradients in half precision are often that small."""
    case = Case("", groups=2, padding="same")
    run_once = runner(case, mode, implementation=implementation)
    for name in ("inputs", "kernel", "outputs"):
        tensors = draw(case, rng, "float16")
        tensors[name] *= np.float16(2.0**-16)
        assert_as_expected(case, tensors, "float16", *run_once(tensors))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_full_precision_offsets_keep_their_precision(rng, dtype, implementation):
    """Positions are float32 for any input dtype: float32 offsets are not rounded to half precision."""
    case = Case("", image=(2, 40), kernel_size=(1, 3), padding="same")
    tensors = draw(case, rng, "float32")
    half = {name: tensors[name].astype(numpy_dtype(dtype)) for name in ("inputs", "kernel", "outputs")}
    tensors = {**tensors, **half}
    outputs, _ = run(case, tensors, implementation=implementation)
    arguments, _ = split_upstream(tensors)
    assert outputs.dtype == numpy_dtype(dtype)
    assert relative_error(outputs, oracle.deformable_conv2d(**arguments, **case.options)) <= HALF_ULP[dtype]


def test_result_dtype(implementation):
    case = Case("", image=(1, 1), kernel_size=(1, 1), modulated=False, use_bias=False)
    zeros = {name: np.zeros(shape, "float32") for name, shape in case.shapes.items() if name != "outputs"}
    for inputs, kernel in itertools.product(DTYPES, DTYPES):
        images = {"inputs": zeros["inputs"].astype(numpy_dtype(inputs))}
        images["kernel"] = zeros["kernel"].astype(numpy_dtype(kernel))
        arguments = {**zeros, **images}
        symbols = {name: keras.KerasTensor(a.shape, a.dtype.name) for name, a in arguments.items()}
        for given in (tensors_of(arguments), symbols):
            found = call(given, case, implementation=implementation).dtype
            assert found == keras.backend.result_type(inputs, kernel), (inputs, kernel)


def grouped_conv(inputs, kernel, case):
    """`keras.ops.conv` for each group, because TensorFlow has no gradient of grouped convolutions on CPUs."""
    parts = zip(tf.split(inputs, case.groups, axis=-1), tf.split(kernel, case.groups, axis=-1), strict=True)
    options = {"strides": case.strides, "padding": case.padding, "dilation_rate": case.dilation_rate}
    return tf.concat(
        [keras.ops.conv(part, weights, data_format="channels_last", **options) for part, weights in parts],
        axis=-1,
    )


def conv_value_and_gradients(arguments, upstream, case):
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        outputs = grouped_conv(arguments["inputs"], arguments["kernel"], case) + arguments["bias"]
    return outputs, tape.gradient(outputs, arguments, upstream)


AT_REST = {"image": (9, 8), "kernel_size": (2, 3), "padding": "same", "modulated": False}


@pytest.mark.parametrize(
    "case",
    [
        Case("same", **AT_REST),
        Case("valid", **{**AT_REST, "padding": "valid"}),
        # TensorFlow's convolution supports either strides or dilation, not both.
        Case("strides", strides=2, **AT_REST),
        Case("strides_2_1", strides=(2, 1), **{**AT_REST, "padding": "valid"}),
        Case("dilation", dilation_rate=2, **AT_REST),
        Case("dilation_1_3", dilation_rate=(1, 3), **{**AT_REST, "padding": "valid"}),
        Case("groups", groups=2, **AT_REST),
        Case("depthwise", groups=4, filters=4, strides=2, **AT_REST),
        Case("depthwise_multiplier", groups=4, filters=8, dilation_rate=2, **AT_REST),
    ],
    ids=str,
)
def test_at_rest_it_is_a_convolution(rng, case, implementation):
    arrays = draw(case, rng, "float64")
    arrays["offsets"][:] = 0
    arguments, upstream = split_upstream(tensors_of(arrays))
    outputs, gradients = value_and_gradients(arguments, upstream, case=case, implementation=implementation)
    del arguments["offsets"], gradients["offsets"]
    wanted, wanted_gradients = conv_value_and_gradients(arguments, upstream, case)
    assert relative_error(outputs, wanted) <= VALUE_BOUND["float64"]
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted_gradients[name]) <= GRADIENT_BOUND["float64"], name


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("dense", batch=3, kernel_size=(2, 2), padding="same", offset_groups=2), "bfloat16"),
        (Case("depthwise", batch=3, kernel_size=(2, 2), groups=4, filters=4, strides=2), "float32"),
        (Case("wide", batch=3, kernel_size=(1, 2), channels=64, filters=32, use_bias=False), "float32"),
    ],
    ids=str,
)
def test_batch_chunks_change_no_bit(rng, case, dtype, implementation):
    """Results are bitwise equal, except for TensorFlow's matrix product on CPUs without AVX-512.

    On such CPUs, its last bits depend on the row.
    """
    is_product = implementation == "reference" and case.groups == 1
    last_bit = {"float32": 1e-6, "bfloat16": 2.0**-7}[dtype] if is_product else 0.0
    tensors = draw(case, rng, dtype)
    compute = runner(case, implementation=implementation)
    whole, whole_gradients = compute(tensors)
    for number in range(case.batch):
        parts = {
            name: tensor if name in ("kernel", "bias") else tensor[number : number + 1]
            for name, tensor in tensors.items()
        }
        alone, gradients = compute(parts)
        assert relative_error(whole[number], alone[0]) <= last_bit
        for name in ("inputs", "offsets", "mask"):
            assert relative_error(whole_gradients[name][number], gradients[name][0]) <= last_bit, name


@pytest.mark.parametrize("mode", ["eager", pytest.param("xla", marks=pytest.mark.slow)])
def test_twice_gives_the_same_bits(rng, mode, implementation):
    case = Case("", batch=4, image=(32, 32), kernel_size=(1, 2), padding="same", offset_groups=2)
    tensors = draw(case, rng)
    compute = runner(case, mode, implementation=implementation)
    first, first_gradients = compute(tensors)
    again, again_gradients = compute(tensors)
    np.testing.assert_array_equal(first, again)
    for name, gradient in first_gradients.items():
        np.testing.assert_array_equal(gradient, again_gradients[name], err_msg=name)
