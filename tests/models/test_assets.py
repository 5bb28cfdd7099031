"""Tests of layer state outside of variables: `attach_das` copies it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_das.models import attach_das
from tests.models.backbones import SMALL_GATE, images

WORDS = tf.constant([["a b"], ["c a"]])


class Scaled(keras.layers.Layer):
    """A layer with an asset: a factor stored in a file."""

    factor = 1.0

    def call(self, inputs):
        return inputs * self.factor

    def save_assets(self, dir_path):
        with open(f"{dir_path}/factor.txt", "w") as file:
            file.write(str(self.factor))

    def load_assets(self, dir_path):
        with open(f"{dir_path}/factor.txt") as file:
            self.factor = float(file.read())


class Around(keras.layers.Layer):
    """A layer that contains a layer with assets."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = Scaled()

    def call(self, inputs):
        return self.inner(inputs)


def scaled():
    layer = Scaled()
    layer.factor = 3.0
    return layer


def around():
    layer = Around()
    layer.inner.factor = 3.0
    return layer


def adapted(layer, data):
    layer.adapt(data)
    return layer


def set_strings():
    layer = keras.layers.StringLookup(output_mode="one_hot")
    layer.set_vocabulary(["c a", "a b", "x"])
    return layer


def with_assets(layer, inputs):
    """A model whose inputs are an image and the input of `layer`."""
    image, second = keras.Input((16, 16, 3)), keras.Input(inputs.shape[1:], dtype=inputs.dtype)
    x = keras.layers.Conv2D(4, 3, strides=4, padding="same")(image)
    encoded = keras.layers.Flatten()(keras.ops.cast(layer(second), "float32"))
    pooled = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model([image, second], keras.layers.Concatenate()([pooled, encoded]))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: adapted(keras.layers.StringLookup(), ["c a", "a b", "a b"]), WORDS),
        (set_strings, WORDS),
        (lambda: adapted(keras.layers.IntegerLookup(), [5, 7, 7]), tf.constant([[7], [5]], tf.int64)),
        (lambda: keras.layers.StringLookup(vocabulary=["c a", "a b"]), WORDS),
        (lambda: adapted(keras.layers.TextVectorization(output_sequence_length=3), ["a b", "c"]), WORDS),
        (lambda: adapted(keras.layers.TextVectorization(output_mode="tf_idf"), ["a b", "a c"]), WORDS),
        (lambda: adapted(keras.layers.TextVectorization(output_mode="count"), ["a b", "a c"]), WORDS),
        (scaled, tf.constant([[1.0], [2.0]])),
        (around, tf.constant([[1.0], [2.0]])),
    ],
    ids=["adapt", "set", "integers", "config", "int", "tf_idf", "count", "custom", "nested"],
)
def test_outputs(make, inputs, rng):
    base = with_assets(make(), inputs)
    both = [tf.constant(images(rng, 16)), inputs]
    np.testing.assert_array_equal(attach_das(base, **SMALL_GATE)(both), base(both))


def test_assets_of_a_nested_model_in_a_graph(rng):
    text = keras.Input((1,), dtype="string")
    vectorize = adapted(keras.layers.TextVectorization(output_sequence_length=3), ["a b", "c"])
    encoder = keras.Model(text, keras.layers.Embedding(8, 2)(vectorize(text)))
    base = with_assets(encoder, WORDS)
    data = tf.data.Dataset.from_tensors(((images(rng, 16), WORDS),))
    gated = attach_das(base, **SMALL_GATE)
    np.testing.assert_array_equal(gated.predict(data, verbose=0), base.predict(data, verbose=0))
