"""Checks that all layers of the package must pass, called with many configurations."""

import inspect

import keras
import numpy as np
import tensorflow as tf


def random_images(shape, dtype="float32", seed=7):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def randomize_weights(layer, seed=11, scale=0.3):
    """Moves weights away from their initial zeros and ones, so that each of them affects the output."""
    generator = np.random.default_rng(seed)
    layer.set_weights(
        [w + scale * generator.normal(size=w.shape).astype(w.dtype) for w in layer.get_weights()]
    )


def check_config_round_trip(layer):
    """Checks that each constructor argument is restored under its own name."""
    rebuilt = type(layer).from_config(layer.get_config())
    assert rebuilt.get_config() == layer.get_config()
    for name in inspect.signature(type(layer)).parameters.keys() - {"kwargs"}:
        given, found = (keras.saving.serialize_keras_object(getattr(of, name)) for of in (layer, rebuilt))
        assert found == given, name
    registered = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(registered) is type(layer)
    assert registered.get_config() == layer.get_config()


def check_regularizers_and_constraints(layer):
    """Checks that each weight has the regularizer and the constraint of its kind, and no others."""
    kinds = {"kernel": "kernel", "offset_kernel": "offset", "bias": "bias"}
    for weight in layer.trainable_weights:
        for what in ("regularizer", "constraint"):
            wanted = getattr(layer, f"{kinds.get(weight.name)}_{what}", None)
            assert getattr(weight, what) is wanted, (weight.path, what)


def check_symbolic_call_agrees(layer, images):
    """Checks that a symbolic call, with known or unknown sizes, infers the shape and dtype of a real call."""
    outputs = layer(images)
    for shape in (images.shape, (None, *images.shape[1:]), _open_sizes(images.shape, layer.data_format)):
        spec = layer(keras.KerasTensor(shape, dtype=images.dtype))
        assert spec.dtype == keras.backend.standardize_dtype(outputs.dtype)
        assert len(spec.shape) == 4
        assert all(s in (None, o) for s, o in zip(spec.shape, outputs.shape, strict=True)), spec.shape
        assert layer.compute_output_shape(shape) == spec.shape


def check_modes_agree(layer, images, tolerance):
    """Compares an eager call with a `tf.function` with unknown sizes and with XLA."""
    expected = np.asarray(layer(images), "float64")
    signature = [tf.TensorSpec(_open_sizes(images.shape, layer.data_format), images.dtype)]
    open_graph = tf.function(layer, input_signature=signature)
    for function in (open_graph, tf.function(layer, jit_compile=True)):
        found = np.asarray(function(tf.constant(images)), "float64")
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def check_saves_and_loads(layer, images, folder):
    inputs = keras.Input(images.shape[1:], dtype=images.dtype)
    model = keras.Model(inputs, layer(inputs))
    model.save(folder / "model.keras")
    loaded = keras.saving.load_model(folder / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))
    model.save_weights(folder / "model.weights.h5")
    randomize_weights(loaded, seed=5)
    loaded.load_weights(folder / "model.weights.h5")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))


def check_every_weight_learns(layer, images):
    """Checks that all weights have finite and nonzero gradients."""
    with tf.GradientTape() as tape:
        outputs = tf.cast(layer(images, training=True), "float32")
        loss = tf.reduce_sum(outputs * random_images(outputs.shape, seed=3))
    for weight, gradient in zip(
        layer.trainable_weights, tape.gradient(loss, layer.trainable_weights), strict=True
    ):
        assert gradient is not None, weight.path
        assert np.isfinite(np.asarray(gradient, "float32")).all(), weight.path
        assert np.abs(np.asarray(gradient, "float32")).max() > 0, weight.path


def check_fits(layer, images, jit_compile):
    """Checks that `model.fit` reduces the loss."""
    model = keras.Sequential([keras.Input(images.shape[1:]), layer, keras.layers.GlobalAveragePooling2D()])
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit_compile)
    targets = random_images((len(images), model.output_shape[-1]), seed=13)
    losses = model.fit(images, targets, epochs=6, batch_size=len(images), verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def check_mixed_precision(make_layer, images, policy):
    compute = policy.removeprefix("mixed_")
    layer = make_layer(dtype=policy)
    outputs = layer(images)
    assert keras.backend.standardize_dtype(outputs.dtype) == compute
    assert {w.dtype for w in layer.weights} == {"float32"}
    single = make_layer(dtype="float32")
    single.build(images.shape)
    single.set_weights(layer.get_weights())
    expected = np.asarray(single(images))
    error = np.abs(np.asarray(outputs, "float32") - expected).max() / np.abs(expected).max()
    assert error < {"float16": 1e-2, "bfloat16": 8e-2}[compute]


def check_channels_first(make_layer, images):
    last, first = make_layer(data_format="channels_last"), make_layer(data_format="channels_first")
    expected = last(images)
    swapped = np.transpose(images, (0, 3, 1, 2))
    first.build(swapped.shape)
    randomize_weights(last)
    first.set_weights(last.get_weights())
    expected = np.transpose(np.asarray(last(images)), (0, 3, 1, 2))
    assert first.compute_output_shape(swapped.shape) == expected.shape
    np.testing.assert_allclose(np.asarray(first(swapped)), expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(first.predict_offsets(swapped), last.predict_offsets(images), strict=True):
        assert (mine is None) == (theirs is None)  # layers without a mask return None
        if mine is not None:
            np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=1e-5, atol=1e-6)


def check_empty_batch(layer, images):
    empty = images[:0]
    expected = (0, *layer.compute_output_shape(images.shape)[1:])
    signature = [tf.TensorSpec((None, *images.shape[1:]), images.dtype)]
    for function in (layer, tf.function(layer, input_signature=signature)):
        assert tuple(function(tf.constant(empty)).shape) == expected
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(empty))
    for gradient in tape.gradient(loss, layer.trainable_weights):
        np.testing.assert_array_equal(np.asarray(gradient), 0)


def _open_sizes(shape, data_format):
    """Returns the shape with all dimensions except the channels unknown."""
    return (None, None, None, shape[3]) if data_format == "channels_last" else (None, shape[1], None, None)
