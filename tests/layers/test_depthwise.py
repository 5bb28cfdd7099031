"""Tests of the gate's depthwise convolution: agreement of XLA with TensorFlow, and empty batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_das.layers import depthwise
from keras_das.layers.depthwise import DepthwiseConv2D
from keras_das.ops import native

BOUNDS = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-13}


def _call(layer, images, upstream):
    with tf.GradientTape() as tape:
        tape.watch(images)
        output = layer(images)
    return output, *tape.gradient(output, [images, layer.kernel], upstream)


def _is_lowered_to_convolution(layer, images):
    function = tf.function(layer, jit_compile=True)
    return "convolution" in function.experimental_get_compiler_ir(images)(stage="hlo")


@pytest.mark.parametrize(
    ("kernel_size", "dtype"),
    [
        ((3, 3), "float32"),
        ((1, 3), "float16"),
        ((2, 2), "bfloat16"),
        ((5, 4), "float64"),
        ((1, 1), "float32"),
    ],
)
def test_agrees_with_tensorflow(kernel_size, dtype, rng):
    layer = DepthwiseConv2D(kernel_size, padding="same", use_bias=False, dtype=dtype)
    images, upstream = (tf.cast(rng.normal(size=(3, 7, 5, 6)), dtype) for _ in range(2))
    found = tf.function(_call, jit_compile=True)(layer, images, upstream)
    assert not _is_lowered_to_convolution(layer, images)
    # In float64, because TensorFlow sums half types in their own precision.
    exact = keras.layers.DepthwiseConv2D(kernel_size, padding="same", use_bias=False, dtype="float64")
    exact.build(images.shape)
    exact.kernel.assign(layer.kernel)
    expected = _call(exact, tf.cast(images, "float64"), tf.cast(upstream, "float64"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        ours, theirs = np.asarray(ours, "float64"), np.asarray(theirs, "float64")
        assert np.abs(ours - theirs).max() <= BOUNDS[dtype] * np.abs(theirs).max()


def test_image_smaller_than_kernel(rng):
    layer = DepthwiseConv2D(5, padding="same", use_bias=False)
    images = tf.cast(rng.normal(size=(2, 1, 2, 3)), "float32")
    np.testing.assert_allclose(tf.function(layer, jit_compile=True)(images), layer(images), rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("batch", [0, 3])
def test_an_empty_batch_has_no_gradient_whatever_comes_in(batch, compiled):
    def gradient(images, upstream):
        kernel = tf.ones((3, 3, 2))
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            guarded = depthwise._zero_gradient_if_empty(kernel, keras.ops.shape(images)[0])
        return tape.gradient(guarded, kernel, upstream)

    if compiled:
        of_any_batch = [tf.TensorSpec((None, 4, 4, 2)), tf.TensorSpec((3, 3, 2))]
        gradient = tf.function(gradient, input_signature=of_any_batch)
    upstream = tf.fill((3, 3, 2), 7.0 if batch else np.nan)
    np.testing.assert_array_equal(gradient(tf.ones((batch, 4, 4, 2)), upstream), 7 if batch else 0)


def test_elsewhere_it_is_keras_own(monkeypatch):
    assert not native.xla_compiles_for_cpu()
    assert not tf.function(native.xla_compiles_for_cpu)().numpy()
    assert tf.function(native.xla_compiles_for_cpu, jit_compile=True)().numpy()
    monkeypatch.setitem(native._PLACES, "tensorflow", lambda context, tensors: {"GPU": "there is a GPU"})
    layer, images = DepthwiseConv2D(3, padding="same", use_bias=False), tf.ones((1, 4, 4, 2))
    layer(images)
    assert _is_lowered_to_convolution(layer, images)
