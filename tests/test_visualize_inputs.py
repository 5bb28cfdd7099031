"""Tests of `visualize` with multi-input models: the image that a gate depends on is selected."""

import keras
import numpy as np
import pytest

import keras_das
from keras_das import visualize


def gated(image, name, strides=2):
    """A convolution followed by a gate that is not at its identity initialization."""
    x = keras.layers.Conv2D(4, 3, strides, padding="same")(image)
    return keras_das.DASLayer(reduction=0.5, offset_initializer="random_normal", name=name)(x)


def head(*features):
    pooled = [keras.layers.Flatten()(x) for x in features]
    return keras.layers.Dense(3)(keras.layers.Concatenate()(pooled))


def image_and_metadata(in_a_dict=False):
    image, age = keras.Input((16, 12, 3), name="image"), keras.Input((2,), name="age")
    inputs = {"image": image, "age": age} if in_a_dict else [image, age]
    return keras.Model(inputs, head(gated(image, "gate"), age))


def two_images():
    """A model with a large and a small image: one gate for each, and one gate that depends on both."""
    large, small = keras.Input((16, 16, 3), name="large"), keras.Input((8, 8, 1), name="small")
    left, right = gated(large, "left"), gated(small, "right", 1)
    both = keras_das.DASLayer(name="both")(keras.layers.Concatenate()([left, right]))
    return keras.Model([large, small], head(both))


def alone(model, image, layer):
    """The submodel from one image to a layer."""
    return keras.Model(model.get_layer(image).output, model.get_layer(layer).output)


@pytest.fixture
def inputs(rng):
    return [rng.normal(size=(16, 12, 3)).astype("float32"), np.array([1, 2], "float32")]


def assert_same_points(found, expected):
    for mine, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6)


def test_image_and_metadata(inputs):
    model = image_and_metadata()
    part = alone(model, "image", "gate")
    expected = visualize.sampling_points(part, inputs[0], "gate", (5, 3))
    forms = [
        inputs,
        tuple(inputs),
        [x[None] for x in inputs],
        dict(zip(["image", "age"], inputs, strict=True)),
    ]
    for form in forms:
        assert_same_points(visualize.sampling_points(model, form, "gate", (5, 3)), expected)
    expected = visualize.gate_map(part, inputs[0], "gate")
    np.testing.assert_allclose(visualize.gate_map(model, inputs, "gate"), expected, rtol=1e-6)
    assert visualize.grad_cam(model, inputs, "gate").shape == (8, 6)
    ((gate, x),) = visualize.gate_inputs(model, [np.stack([x, x]) for x in inputs])
    assert (gate.name, x.shape) == ("gate", (2, 8, 6, 4))


def test_inputs_in_a_dict(inputs):
    model = image_and_metadata(in_a_dict=True)
    named = {"image": inputs[0], "age": inputs[1]}
    expected = visualize.gate_map(alone(model, "image", "gate"), inputs[0], "gate")
    np.testing.assert_allclose(visualize.gate_map(model, named, "gate"), expected, rtol=1e-6)


def test_each_gate_has_its_image(rng):
    model = two_images()
    images = [rng.normal(size=(16, 16, 3)).astype("float32"), rng.normal(size=(8, 8, 1)).astype("float32")]
    for name, image, pixels in (("left", "large", images[0]), ("right", "small", images[1])):
        expected = visualize.sampling_points(alone(model, image, name), pixels, name, (5, 6))
        assert_same_points(visualize.sampling_points(model, images, name, (5, 6)), expected)
    with pytest.raises(ValueError, match=r"Received: \['both'\], which depends on \['large', 'small'\]"):
        visualize.sampling_points(model, images, "both", (5, 6))
    with pytest.raises(ValueError, match=r"`point` must be .* from -0.5 to 7.5"):
        visualize.sampling_points(model, images, "right", (12, 6))


def test_images_of_any_size(rng):
    large, small = keras.Input((None, None, 3), name="large"), keras.Input((None, None, 3), name="small")
    pooled = [
        keras.layers.GlobalAveragePooling2D()(gated(x, name)) for x, name in ((large, "a"), (small, "b"))
    ]
    model = keras.Model([large, small], keras.layers.Add()(pooled))
    images = [rng.normal(size=(size, size, 3)).astype("float32") for size in (16, 8)]
    expected = visualize.sampling_points(alone(model, "small", "b"), images[1], "b", (5, 6))
    assert_same_points(visualize.sampling_points(model, images, "b", (5, 6)), expected)


def test_figures(inputs):
    pytest.importorskip("matplotlib")
    model = image_and_metadata()
    figure = visualize.plot_gates(model, [inputs, inputs], point=(3, 3))
    assert len([axes for axes in figure.axes if axes.get_label() != "<colorbar>"]) == 4
    assert visualize.plot_sampling_points(model, inputs, "gate", (3, 3)).axes[0].get_xlim() == (-0.5, 11.5)
    assert visualize.plot_grad_cam({"gates": (model, "gate")}, inputs).axes


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: x[0], r"`image` must be a list or dict .* \['image', 'age'\]. Received: a ndarray"),
        (lambda x: x[:1], r"Received: a list of 1"),
        (lambda x: {"image": x[0]}, r"Received: the keys \['image'\]"),
        (
            lambda x: x[::-1],
            r"must have the shape \(16, 12, 3\).* for the input 'image'. Received: the shape \(2,\)",
        ),
        (lambda x: [np.stack([v, v]) for v in x], r"Received: the shape \(2, 16, 12, 3\)"),
    ],
)
def test_what_does_not_fit(form, message, inputs):
    with pytest.raises(ValueError, match=message):
        visualize.gate_map(image_and_metadata(), form(inputs), "gate")


def test_lists_for_a_model_of_one_input(inputs):
    model = alone(image_and_metadata(), "image", "gate")
    with pytest.raises(ValueError, match=r"`image` must be an array for a model .* Received: a list"):
        visualize.gate_map(model, inputs, "gate")
    with pytest.raises(ValueError, match="`images` must be a list or dict of batches"):
        visualize.gate_inputs(image_and_metadata(), inputs[0])
