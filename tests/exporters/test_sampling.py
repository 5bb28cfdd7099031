"""Tests of the sampling in SavedModels (by crops) and LiteRT (by lookup): agreement with the oracle."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das.exporters import litert_sampling as lookup
from keras_das.exporters import saved_model_sampling as crops
from keras_das.exporters.saved_model import nodes, read
from keras_das.ops.deformable import substituted
from tests import oracle
from tests.ops.op_cases import (
    CASES,
    COMPILED_CASES,
    VALUE_BOUND,
    Case,
    call,
    draw,
    in_turns,
    relative_error,
    split_upstream,
)
from tests.ops.tf_harness import tensors_of

ONE_GROUP = [case for case in CASES if case.options["offset_groups"] == 1]
DEPTHWISE = [
    Case("depthwise", image=(5, 7), channels=3, groups=3, filters=3, padding="same"),
    Case("strided", image=(7, 6), channels=2, groups=2, filters=2, padding="same", strides=2),
    Case("dilated", image=(9, 8), channels=3, groups=3, filters=3, dilation_rate=(2, 1), kernel_size=(3, 2)),
    Case("padded", image=(4, 5), channels=3, groups=3, filters=3, padding=((2, 1), (0, 3)), modulated=False),
]
IMAGE = Case("", image=(6, 5), channels=4, groups=4, filters=4, padding="same", batch=2)


@pytest.fixture(params=[crops, lookup], ids=["crops", "lookup"])
def sampling(request):
    return request.param


def compute(sampling, case, tensors, data_format="channels_last", traced=False):
    arguments, _ = split_upstream(tensors_of(tensors, data_format))

    def convolve(arguments):
        with substituted(sampling.deformable_conv2d):
            return call(arguments, case, data_format)

    output = tf.function(convolve)(arguments) if traced else convolve(arguments)
    return np.moveaxis(output.numpy(), 1, -1) if data_format == "channels_first" else output.numpy()


def wanted(case, tensors):
    return oracle.deformable_conv2d(**split_upstream(tensors)[0], **case.options)


@pytest.mark.parametrize(("case", "dtype", "data_format"), in_turns([*ONE_GROUP, *DEPTHWISE]), ids=str)
def test_values(sampling, rng, case, dtype, data_format):
    tensors = draw(case, rng, dtype)
    found = compute(sampling, case, tensors, data_format)
    assert relative_error(found, wanted(case, tensors)) < VALUE_BOUND[dtype]


@pytest.mark.parametrize(
    ("sampling", "case", "operation"),
    [(crops, case, "CropAndResize") for case in COMPILED_CASES[:3]]
    + [(lookup, case, "BatchMatMulV2") for case in DEPTHWISE[:3]],
    indirect=["sampling"],
    ids=str,
)
def test_graphs_of_unknown_sizes(sampling, rng, case, operation):
    tensors = draw(case, rng)
    arguments, _ = split_upstream(tensors_of(tensors))
    specs = {
        name: tf.TensorSpec(
            [None] * (len(t.shape) - 1) + [t.shape[-1]] if name != "kernel" else t.shape, t.dtype
        )
        for name, t in arguments.items()
    }
    with substituted(sampling.deformable_conv2d):
        traced = tf.function(lambda arguments: call(arguments, case)).get_concrete_function(specs)
    graph = traced.graph.as_graph_def()
    bodies = [graph.node, *(of.node_def for of in graph.library.function)]
    assert operation in {node.op for body in bodies for node in body}
    found = traced(*tf.nest.flatten(arguments))
    assert relative_error(found.numpy(), wanted(case, tensors)) < VALUE_BOUND["float32"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_offsets_that_are_not_in_the_image(sampling, rng, bad):
    """Samples out of bounds are 0 and samples at NaN positions are NaN, regardless of the pixels."""
    tensors = draw(IMAGE, rng)
    tensors["offsets"][0, 1, 2, 3] = bad
    tensors["offsets"][1, 0, 0] = bad
    with np.errstate(invalid="ignore"):
        expected = wanted(IMAGE, tensors)
    assert np.isnan(expected).any() == np.isnan(bad)
    np.testing.assert_allclose(compute(sampling, IMAGE, tensors), expected, rtol=1e-4, atol=1e-5)
    tensors["offsets"][..., ::2], tensors["offsets"][..., 1::2] = np.inf, -np.inf
    tensors["inputs"][:] = np.nan
    found = compute(sampling, IMAGE, tensors) - split_upstream(tensors)[0].get("bias", 0)
    np.testing.assert_array_equal(found, 0)


def test_borders(sampling, rng):
    """Samples fade to 0 within one pixel of the image, and rounding does not remove samples on the border."""
    tensors = draw(IMAGE, rng)
    steps = np.array([-1, -0.999, -0.5, -1e-7, 0, 1e-7, 0.5, 0.999, 1], "float32")
    tensors["offsets"][:] = rng.choice(steps, size=tensors["offsets"].shape)
    assert relative_error(compute(sampling, IMAGE, tensors), wanted(IMAGE, tensors)) < VALUE_BOUND["float32"]


@pytest.mark.parametrize(
    ("changes", "jit"), [({"offset_groups": 2}, False), ({"dtype": "float64"}, False), ({}, True)], ids=str
)
def test_the_reference_computes_the_rest(sampling, rng, changes, jit):
    case = Case(
        "",
        image=(4, 3),
        kernel_size=(1, 2),
        channels=4,
        groups=4,
        filters=4,
        offset_groups=changes.get("offset_groups", 1),
    )
    tensors = draw(case, rng, changes.get("dtype", "float32"))
    arguments, _ = split_upstream(tensors_of(tensors))
    with substituted(sampling.deformable_conv2d):
        found = tf.function(lambda arguments: call(arguments, case), jit_compile=jit)(arguments)
    bound = VALUE_BOUND[changes.get("dtype", "float32")]
    assert relative_error(found.numpy(), wanted(case, tensors)) < bound


def test_empty_batches(sampling):
    case = Case("", batch=0, image=(4, 3), padding="same", channels=2, groups=2, filters=2)
    tensors = draw(case, np.random.default_rng(0))
    assert compute(sampling, case, tensors, traced=True).shape == wanted(case, tensors).shape


def test_a_saved_model_samples_by_one_operation(tmp_path, rng):
    layer = keras_das.DASLayer(identity_init=False, offset_initializer="random_normal")
    model = keras.Sequential([keras.Input((None, None, 8), name="image"), layer])
    keras_das.export(model, tmp_path / "model")
    assert "CropAndResize" in {node.op for node in nodes(read(tmp_path / "model"))}
    images = rng.normal(size=(2, 7, 9, 8)).astype("float32")
    loaded = tf.saved_model.load(tmp_path / "model")
    served = loaded.serve(images)
    np.testing.assert_allclose(served, model(images), rtol=1e-4, atol=1e-5)
