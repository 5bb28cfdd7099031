"""The op against the oracle, and against ordinary convolutions where its offsets are zero."""

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
    VALUE_BOUND,
    Case,
    assert_as_expected,
    call,
    draw,
    numpy_dtype,
    relative_error,
    split_upstream,
)
from tests.ops.tf_harness import run, runner, tensors_of, value_and_gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(rng, case, data_format, dtype, implementation):
    tensors = draw(case, rng, dtype)
    results = run(case, tensors, data_format=data_format, implementation=implementation)
    assert_as_expected(case, tensors, dtype, *results)


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(
    ("case", "dtype", "data_format"),
    # Each case once a mode, so that compiling stays affordable: dtypes and data formats take turns.
    [(case, DTYPES[number % 4], DATA_FORMATS[number // 4 % 2]) for number, case in enumerate(COMPILED_CASES)],
    ids=str,
)
def test_compiled(rng, case, dtype, data_format, mode, implementation):
    tensors = draw(case, rng, dtype)
    results = run(case, tensors, mode, data_format, implementation)
    assert_as_expected(case, tensors, dtype, *results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_types(rng, case, dtype, implementation):
    """No more than twice as far off as computing in the half type throughout, and float32 inside."""
    tensors = draw(case, rng, dtype)
    outputs, gradients = run(case, tensors, implementation=implementation)
    assert outputs.dtype == numpy_dtype(dtype)
    assert_as_expected(case, tensors, dtype, outputs, gradients)

    arguments, _ = split_upstream(tensors)
    exact = oracle.deformable_conv2d(**arguments, **case.options)
    naive = oracle.naive_lowprec(**arguments, **case.options, dtype=numpy_dtype(dtype))
    assert relative_error(outputs, exact) <= max(2 * relative_error(naive, exact), HALF_ULP[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_full_precision_offsets_keep_their_precision(rng, dtype, implementation):
    """Positions are float32 whatever the pixels are: float32 offsets are not rounded to a half type."""
    case = Case("", image=(5, 40), padding="same")
    tensors = draw(case, rng, "float32")
    half = {name: tensors[name].astype(numpy_dtype(dtype)) for name in ("inputs", "kernel", "outputs")}
    tensors = {**tensors, **half}
    outputs, _ = run(case, tensors, implementation=implementation)
    arguments, _ = split_upstream(tensors)
    assert outputs.dtype == numpy_dtype(dtype)
    assert relative_error(outputs, oracle.deformable_conv2d(**arguments, **case.options)) <= HALF_ULP[dtype]


@pytest.mark.parametrize(("inputs", "kernel"), list(itertools.product(DTYPES, DTYPES)))
def test_result_dtype(inputs, kernel, implementation):
    case = Case("", modulated=False, use_bias=False)
    arguments = {name: np.zeros(shape, "float32") for name, shape in case.shapes.items()}
    del arguments["outputs"]
    arguments["inputs"] = arguments["inputs"].astype(numpy_dtype(inputs))
    arguments["kernel"] = arguments["kernel"].astype(numpy_dtype(kernel))
    wanted = keras.backend.result_type(inputs, kernel)
    assert call(tensors_of(arguments), case, implementation=implementation).dtype == wanted
    symbols = {name: keras.KerasTensor(a.shape, a.dtype.name) for name, a in arguments.items()}
    assert call(symbols, case, implementation=implementation).dtype == wanted


def grouped_conv(inputs, kernel, case):
    """`keras.ops.conv` group by group: TensorFlow has no gradient of a grouped convolution on the CPU."""
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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    # TensorFlow's convolution takes strides or dilation, not both.
    ("strides", "dilation"),
    [(1, 1), (2, 1), ((2, 1), 1), (1, 2), (1, (1, 3))],
)
@pytest.mark.parametrize(("groups", "filters"), [(1, 6), (2, 6), (4, 4), (4, 8)])
def test_at_rest_it_is_a_convolution(rng, groups, filters, strides, dilation, padding, dtype, implementation):
    case = Case(
        "",
        image=(9, 8),
        kernel_size=(2, 3),
        groups=groups,
        filters=filters,
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        modulated=False,
    )
    arrays = draw(case, rng, dtype)
    arrays["offsets"][:] = 0
    arguments, upstream = split_upstream(tensors_of(arrays))
    outputs, gradients = value_and_gradients(arguments, upstream, case=case, implementation=implementation)
    del arguments["offsets"], gradients["offsets"]
    wanted, wanted_gradients = conv_value_and_gradients(arguments, upstream, case)
    assert relative_error(outputs, wanted) <= VALUE_BOUND[dtype]
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted_gradients[name]) <= GRADIENT_BOUND[dtype], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        Case("dense", batch=8, kernel_size=(2, 2), padding="same", offset_groups=2),
        Case("depthwise", batch=8, kernel_size=(2, 2), groups=4, filters=4, strides=2),
        Case("wide", batch=8, kernel_size=(1, 2), channels=64, filters=32, use_bias=False),
    ],
    ids=str,
)
def test_batch_chunks_change_no_bit(rng, case, dtype, implementation):
    """But for TensorFlow's matrix product, whose last bits depend on the row on CPUs without AVX-512."""
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


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_twice_gives_the_same_bits(rng, mode, implementation):
    case = Case("", batch=4, image=(32, 32), kernel_size=(1, 2), padding="same", offset_groups=2)
    tensors = draw(case, rng)
    compute = runner(case, mode, implementation=implementation)
    first, first_gradients = compute(tensors)
    again, again_gradients = compute(tensors)
    np.testing.assert_array_equal(first, again)
    for name, gradient in first_gradients.items():
        np.testing.assert_array_equal(gradient, again_gradients[name], err_msg=name)
