"""Tests of the attention modules compared with DAS: agreement with the papers' equations in NumPy."""

import attention
import keras
import numpy as np
import pytest
from scipy import signal, special

SHAPE = (2, 7, 5, 32)


@pytest.fixture
def images(rng):
    return rng.normal(size=SHAPE).astype("float32")


def sigmoid(x):
    return special.expit(x)


def built(layer, rng):
    layer.build(SHAPE)
    for weight in layer.weights:
        values = rng.normal(size=weight.shape)
        weight.assign(np.abs(values) + 0.5 if "variance" in weight.name else values)
    return layer


def convolve(x, kernel):
    """A "same" convolution of `(N, H, W, c)` with `(kh, kw, c)`."""
    return np.stack(
        [
            sum(signal.correlate2d(x[n, ..., c], kernel[..., c], "same") for c in range(x.shape[3]))
            for n in range(len(x))
        ]
    )


def pooled(x, axis):
    return np.stack([x.mean(axis), x.max(axis)], axis=-1)


def test_se(images, rng):
    layer = built(attention.SE(reduction=8), rng)
    w1, b1, w2, b2 = layer.get_weights()
    assert w1.shape == (32, 4)
    scale = 2 * sigmoid(np.maximum(images.mean((1, 2)) @ w1 + b1, 0) @ w2 + b2)
    np.testing.assert_allclose(layer(images), images * scale[:, None, None], rtol=1e-4, atol=1e-5)


def test_cbam(images, rng):
    layer = built(attention.CBAM(reduction=8), rng)
    w1, b1, w2, b2, kernel, bias = layer.get_weights()
    channel = 2 * sigmoid(
        sum(np.maximum(x @ w1 + b1, 0) @ w2 + b2 for x in (images.mean((1, 2)), images.max((1, 2))))
    )
    refined = images * channel[:, None, None]
    spatial = 2 * sigmoid(convolve(pooled(refined, 3), kernel[..., 0]) + bias)
    np.testing.assert_allclose(layer(images), refined * spatial[..., None], rtol=1e-4, atol=1e-5)


def test_both_start_at_one(images):
    for layer in (attention.SE, attention.CBAM):
        np.testing.assert_array_equal(layer()(images), images)


@pytest.mark.parametrize("layer", [attention.SE, attention.CBAM])
def test_saves_and_learns(layer, rng, tmp_path):
    images = rng.normal(size=(32, *SHAPE[1:])).astype("float32")  # enough that no ReLU is dead
    inputs = keras.Input(SHAPE[1:])
    model = keras.Model(inputs, layer()(inputs))
    model.compile("sgd", "mse", run_eagerly=True)
    before = [np.array(weight) for weight in model.trainable_weights]
    model.fit(images, np.ones_like(images), epochs=2, verbose=0)  # the first epoch updates only zero weights
    after = model.trainable_weights
    assert all(np.any(old != np.array(new)) for old, new in zip(before, after, strict=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), model(images))
