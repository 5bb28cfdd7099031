"""Tests of the op's arguments: errors, unknown sizes, and symbolic calls."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_das import ops
from keras_das.kernels import library
from tests.ops.op_cases import (
    DATA_FORMATS,
    GRADIENT_BOUND,
    VALUE_BOUND,
    Case,
    call,
    draw,
    expected,
    from_layout,
    relative_error,
    split_upstream,
    to_layout,
)
from tests.ops.tf_harness import run, tensors_of, value_and_gradients


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def good_arguments():
    """Valid arguments: a 3x3 kernel, (2, 7, 8, 4) inputs, and six filters."""
    return {
        "inputs": zeros(2, 7, 8, 4),
        "kernel": zeros(3, 3, 4, 6),
        "offsets": zeros(2, 5, 6, 18),
        "mask": zeros(2, 5, 6, 9),
        "bias": zeros(6),
    }


# The invalid arguments, the argument that the error must name, and the value that it must report.
ERRORS = {
    "inputs_rank": ({"inputs": zeros(7, 8, 4)}, "inputs", "(7, 8, 4)"),
    "kernel_rank": ({"kernel": zeros(3, 3, 4)}, "kernel", "(3, 3, 4)"),
    "offsets_rank": ({"offsets": zeros(2, 5, 6, 9, 2)}, "offsets", "(2, 5, 6, 9, 2)"),
    "mask_rank": ({"mask": zeros(2, 5, 6)}, "mask", "(2, 5, 6)"),
    "bias_rank": ({"bias": zeros(1, 6)}, "bias", "(1, 6)"),
    "bias_size": ({"bias": zeros(5)}, "bias", "(5,)"),
    "offsets_depth": ({"offsets": zeros(2, 5, 6, 9)}, "offsets", "(2, 5, 6, 9)"),
    "offsets_space": ({"offsets": zeros(2, 7, 8, 18)}, "offsets", "(2, 7, 8, 18)"),
    "offsets_batch": ({"offsets": zeros(1, 5, 6, 18)}, "offsets", "(1, 5, 6, 18)"),
    "mask_depth": ({"mask": zeros(2, 5, 6, 18)}, "mask", "(2, 5, 6, 18)"),
    "mask_space": ({"mask": zeros(2, 6, 5, 9)}, "mask", "(2, 6, 5, 9)"),
    "mask_batch": ({"mask": zeros(3, 5, 6, 9)}, "mask", "(3, 5, 6, 9)"),
    "kernel_depth": ({"kernel": zeros(3, 3, 3, 6)}, "kernel", "(3, 3, 3, 6)"),
    "kernel_too_deep": ({"kernel": zeros(3, 3, 8, 6)}, "kernel", "(3, 3, 8, 6)"),
    "kernel_filters": ({"kernel": zeros(3, 3, 1, 6)}, "kernel", "(3, 3, 1, 6)"),
    "kernel_empty": ({"kernel": zeros(0, 3, 4, 6)}, "kernel", "(0, 3, 4, 6)"),
    "kernel_larger": ({"kernel": zeros(9, 3, 4, 6)}, "kernel", "(9, 3, 4, 6)"),
    "kernel_dilated_larger": ({"dilation_rate": 4}, "dilation_rate", "(4, 4)"),
    "strides_zero": ({"strides": 0}, "strides", "0"),
    "strides_pair": ({"strides": (1, -1)}, "strides", "(1, -1)"),
    "strides_three": ({"strides": (1, 1, 1)}, "strides", "(1, 1, 1)"),
    "strides_text": ({"strides": "two"}, "strides", "two"),
    "dilation_zero": ({"dilation_rate": 0}, "dilation_rate", "0"),
    "dilation_pair": ({"dilation_rate": (0, 1)}, "dilation_rate", "(0, 1)"),
    "padding_name": ({"padding": "full"}, "padding", "full"),
    "padding_number": ({"padding": 1}, "padding", "1"),
    "padding_negative": ({"padding": ((0, -1), (0, 0))}, "padding", "-1"),
    "padding_flat": ({"padding": (1, 1)}, "padding", "(1, 1)"),
    "data_format": ({"data_format": "NHWC"}, "data_format", "NHWC"),
    "implementation": ({"implementation": "cuda"}, "implementation", "cuda"),
    "offset_groups_zero": ({"offset_groups": 0}, "offset_groups", "0"),
    "offset_groups_indivisible": ({"offset_groups": 3}, "offset_groups", "3"),
    "offset_groups_text": ({"offset_groups": "1"}, "offset_groups", "1"),
    "integer_inputs": ({"inputs": zeros(2, 7, 8, 4, dtype="int32")}, "inputs", "int32"),
    "integer_kernel": ({"kernel": zeros(3, 3, 4, 6, dtype="int64")}, "kernel", "int64"),
    "integer_offsets": ({"offsets": zeros(2, 5, 6, 18, dtype="int32")}, "offsets", "int32"),
    "bool_mask": ({"mask": zeros(2, 5, 6, 9, dtype="bool")}, "mask", "bool"),
    "complex_bias": ({"bias": zeros(6, dtype="complex64")}, "bias", "complex64"),
}


def test_good_arguments_are_good():
    assert ops.deformable_conv2d(**good_arguments()).shape == (2, 5, 6, 6)


@pytest.mark.parametrize(("wrong", "name", "received"), ERRORS.values(), ids=ERRORS)
def test_refuses(wrong, name, received):
    assert_refused({**good_arguments(), **wrong}, name, received)


# One of each kind: rank, shape, option, and dtype.
@pytest.mark.parametrize("which", ["offsets_rank", "mask_space", "kernel_larger", "integer_inputs"])
def test_refuses_symbols(which):
    wrong, name, received = ERRORS[which]
    arguments = {**good_arguments(), **wrong}
    for key in good_arguments():
        arguments[key] = keras.KerasTensor(arguments[key].shape, arguments[key].dtype.name)
    assert_refused(arguments, name, received)


def assert_refused(arguments, name, received):
    with pytest.raises((ValueError, TypeError)) as caught:
        ops.deformable_conv2d(**arguments)
    message = str(caught.value)
    assert name in message
    assert re.search(f"[Rr]eceived.*{re.escape(received)}", message, re.DOTALL), message


@pytest.mark.parametrize("name", ["inputs", "kernel", "offsets"])
def test_refuses_none(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a tensor. Received: {name}=None"):
        ops.deformable_conv2d(**{**good_arguments(), name: None})


def test_refuses_channels_last_offsets_in_channels_first():
    arguments = good_arguments()
    arguments["inputs"] = zeros(2, 4, 7, 8)
    with pytest.raises(ValueError, match=r"offsets.*Received.*\(2, 5, 6, 18\)"):
        ops.deformable_conv2d(**arguments, data_format="channels_first")


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_unknown_sizes_are_checked_when_they_are_known(jit_compile, implementation):
    """Offsets of another image size must not be read out of bounds."""
    case = Case("", padding="same")
    tensors = tensors_of({name: np.zeros(s, "float32") for name, s in case.shapes.items()})
    arguments, _ = split_upstream(tensors)
    arguments["offsets"] = arguments["offsets"][:, :4]
    unknown = {name: tf.TensorSpec([None] * a.shape.rank, "float32") for name, a in arguments.items()}
    for name in ("inputs", "kernel", "bias"):
        unknown[name] = tf.TensorSpec(arguments[name].shape, "float32")
    for name in ("offsets", "mask"):
        unknown[name] = tf.TensorSpec([None, None, None, arguments[name].shape[-1]], "float32")
    unknown["inputs"] = tf.TensorSpec([None, None, None, case.channels], "float32")
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        tf.function(
            lambda given: call(given, case, implementation=implementation),
            input_signature=[unknown],
            jit_compile=jit_compile,
            autograph=False,
        )(arguments)


@pytest.mark.parametrize("name", ["offsets", "mask"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_unknown_sizes_that_are_swapped(name, data_format, implementation):
    """The tensor has the right number of elements, so no operation that reads it fails by itself."""
    case = Case("", padding="same")
    arrays, _ = split_upstream({name: np.zeros(shape, "float32") for name, shape in case.shapes.items()})
    arrays[name] = arrays[name].swapaxes(1, 2)
    arguments = tensors_of({name: to_layout(name, array, data_format) for name, array in arrays.items()})
    fixed = {name: arguments.pop(name) for name in ("kernel", "bias")}
    unknown = {name: tf.TensorSpec(unknown_size(name, case.shapes[name], data_format)) for name in arguments}
    convolve = tf.function(
        lambda given: call({**given, **fixed}, case, data_format, implementation),
        input_signature=[unknown],
        autograph=False,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"`{name}` must have"):
        convolve(arguments)


@pytest.mark.parametrize("name", ["inputs", "offsets"])
def test_unknown_rank(name):
    given = {**good_arguments(), name: tf.TensorSpec(None)}
    fixed = {key: given.pop(key) for key in list(given) if key != name}
    convolve = tf.function(lambda x: ops.deformable_conv2d(**fixed, **{name: x}), autograph=False)
    with pytest.raises(ValueError, match=f"`{name}` must have a known rank"):
        convolve.get_concrete_function(given[name])


def test_native_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda framework: f"no library for {framework}")
    with pytest.raises(
        RuntimeError, match=r'"native" cannot be used: no library for tensorflow\. Use "auto"'
    ):
        ops.deformable_conv2d(**good_arguments(), implementation="native")
    assert ops.deformable_conv2d(**good_arguments(), implementation="auto").shape == (2, 5, 6, 6)


def test_auto_is_the_default(rng):
    case = Case("", padding="same")
    arguments, _ = split_upstream(tensors_of(draw(case, rng)))
    np.testing.assert_array_equal(
        ops.deformable_conv2d(**arguments, **case.options), call(arguments, case, implementation="auto")
    )


def test_default_data_format_is_keras_own(rng):
    case = Case("", padding="same")
    arguments, _ = split_upstream(draw(case, rng))
    last = call(arguments, case, "channels_last")
    first = {name: to_layout(name, a, "channels_first") for name, a in arguments.items()}
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        outputs = ops.deformable_conv2d(**first, **case.options)
    finally:
        keras.config.set_image_data_format(before)
    np.testing.assert_allclose(from_layout("outputs", outputs, "channels_first"), last, atol=1e-5)


def unknown_size(name, shape, data_format):
    """The shape with unknown batch and spatial sizes."""
    if name in ("kernel", "bias"):
        return shape
    return (None, None, None, shape[-1]) if data_format == "channels_last" else (None, shape[-1], None, None)


@pytest.mark.parametrize(
    ("padding", "jit_compile", "data_format"),
    [
        ("same", False, "channels_first"),
        ("valid", False, "channels_last"),
        ("same", True, "channels_last"),
    ],
)
def test_one_trace_serves_every_size(rng, padding, jit_compile, data_format, implementation):
    case = Case("", kernel_size=(1, 2), padding=padding, strides=2)
    signature = {
        name: tf.TensorSpec(unknown_size(name, shape, data_format), "float32")
        for name, shape in case.shapes.items()
    }
    traces = []

    def compute(arguments, upstream):
        traces.append(1)
        return value_and_gradients(
            arguments, upstream, case=case, data_format=data_format, implementation=implementation
        )

    compute = tf.function(
        compute, input_signature=split_upstream(signature), jit_compile=jit_compile, autograph=False
    )
    for batch, image in ((2, (7, 6)), (3, (4, 9))):
        sized = Case("", batch, image, kernel_size=(1, 2), padding=padding, strides=2)
        tensors = draw(sized, rng)
        outputs, gradients = compute(*split_upstream(tensors_of(tensors, data_format)))
        wanted, wanted_gradients = expected(sized, tensors)
        assert relative_error(from_layout("outputs", outputs, data_format), wanted) <= VALUE_BOUND["float32"]
        for name, gradient in gradients.items():
            gradient = from_layout(name, gradient, data_format)
            assert relative_error(gradient, wanted_gradients[name]) <= GRADIENT_BOUND["float32"], name
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("size", "options", "wanted"),
    [
        ((None, 7, 8), {}, (None, 5, 6, 6)),
        ((2, None, 8), {}, (2, None, 6, 6)),
        ((None, None, None), {"padding": "same", "strides": 2}, (None, None, None, 6)),
        ((2, 7, 8), {"padding": "same", "strides": 2}, (2, 4, 4, 6)),
        ((2, 7, 8), {"padding": "Same", "strides": (3, 1)}, (2, 3, 8, 6)),
        ((2, 7, 8), {"dilation_rate": (3, 2)}, (2, 1, 4, 6)),
        ((2, 7, 8), {"padding": ((1, 2), (0, 3)), "strides": 2}, (2, 4, 5, 6)),
    ],
)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_symbolic_shapes(size, options, wanted, data_format):
    def symbol(depth):
        spatial = size[1:] if depth == 4 else wanted[1:3]
        shape = (size[0], *spatial, depth)
        if data_format == "channels_first":
            shape = (shape[0], shape[3], *shape[1:3])
        return keras.KerasTensor(shape)

    outputs = ops.deformable_conv2d(
        symbol(4), keras.KerasTensor((3, 3, 4, 6)), symbol(18), symbol(9), data_format=data_format, **options
    )
    assert outputs.dtype == "float32"
    if data_format == "channels_first":
        wanted = (wanted[0], wanted[3], *wanted[1:3])
    assert outputs.shape == wanted


@pytest.mark.parametrize(
    ("data_format", "constant_kernel"), [("channels_last", False), ("channels_first", True)]
)
def test_functional_model_round_trip(rng, tmp_path, data_format, constant_kernel, implementation):
    case = Case("", padding="same", strides=2, offset_groups=2)
    arrays, _ = split_upstream(draw(case, rng))
    arrays = {name: to_layout(name, a, data_format) for name, a in arrays.items()}
    symbols = {
        name: keras.Input(batch_shape=unknown_size(name, case.shapes[name], data_format), name=name)
        for name in arrays
    }
    if constant_kernel:
        del symbols["kernel"]
    fixed = {"kernel": arrays["kernel"]} if constant_kernel else {}
    model = keras.Model(symbols, call({**symbols, **fixed}, case, data_format, implementation))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    given = {name: arrays[name] for name in symbols}
    direct = call(arrays, case, data_format, implementation)
    np.testing.assert_array_equal(model(given), direct)
    np.testing.assert_array_equal(loaded(given), direct)


def test_inputs_may_be_variables_and_arrays(rng, implementation):
    case = Case("", padding="same")
    arrays, upstream = split_upstream(draw(case, rng))
    wanted, _ = run(case, {**arrays, "outputs": upstream}, implementation=implementation)
    mixed = {**arrays, "kernel": keras.Variable(arrays["kernel"]), "inputs": tf.Variable(arrays["inputs"])}
    np.testing.assert_array_equal(call(mixed, case, implementation=implementation), wanted)
