"""Tests of `visualize`: sampling points, receptive fields, gate maps, Grad-CAM, figures, and errors."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das import visualize
from keras_das.models import attach_das
from keras_das.visualize.gates import reduce_channels
from tests.models.backbones import SMALL_GATE, cv_resnet, hub_resnet, plain_cnn, randomize

TAPS = 9


def box(size, strides, padding, data_format="channels_last"):
    """A mean filter. Applied to a coordinate image, it returns the coordinates of each window's center."""
    return keras.layers.DepthwiseConv2D(
        size,
        strides,
        padding,
        depthwise_initializer=keras.initializers.Constant(1 / size**2),
        use_bias=False,
        data_format=data_format,
    )


def mean(size, strides, padding):
    return keras.layers.AveragePooling2D(size, strides, padding)


STEMS = {
    "stride 1": lambda: [],
    "stride 2": lambda: [box(3, 2, "same")],
    "stride 4": lambda: [
        keras.layers.ZeroPadding2D(((3, 1), (2, 3))),
        box(7, 2, "valid"),
        mean(3, 2, "same"),
    ],
    "stride 8": lambda: [mean(2, 2, "valid"), box(4, 2, "same"), box(3, 2, "valid")],
    "cropped": lambda: [keras.layers.Cropping2D(((5, 2), (1, 4))), mean(2, 2, "same")],
    "cropped to its center": lambda: [keras.layers.CenterCrop(91, 120), mean(2, 2, "same")],
    "resized": lambda: [keras.layers.Resizing(40, 96), box(3, 1, "same")],
    "upsampled": lambda: [mean(4, 4, "valid"), keras.layers.UpSampling2D(2, interpolation="bilinear")],
}


def coordinates(height, width, data_format="channels_last"):
    """An image of coordinates: the first channel contains y, and the second contains x."""
    image = np.stack(np.indices((height, width)), axis=-1).astype("float32")
    return image if data_format == "channels_last" else np.moveaxis(image, -1, 0)


def set_offsets(layer, offsets, logits=None):
    """Sets the same offsets, of shape (taps, 2), and mask logits at all positions."""
    parts = [np.ravel(offsets)] + ([] if logits is None else [np.ravel(logits)])
    layer.offset_bias.assign(np.concatenate(parts).astype("float32"))


def reader(rng, strides=1, dilation_rate=1, data_format="channels_last"):
    """A deformable convolution that outputs each tap's sample of both channels, multiplied by its mask."""
    layer = keras_das.DeformableConv2D(
        2 * TAPS,
        3,
        strides,
        "same",
        dilation_rate=dilation_rate,
        data_format=data_format,
        name="reader",
    )
    layer.build((None, None, None, 2) if data_format == "channels_last" else (None, 2, None, None))
    layer.kernel.assign(np.eye(2 * TAPS).reshape(3, 3, 2, 2 * TAPS))
    set_offsets(layer, rng.uniform(-1.4, 1.4, (TAPS, 2)), rng.normal(size=TAPS))
    return layer


def check_reads_there(model, image, point, data_format="channels_last"):
    """Checks that the layer outputs the coordinates that `sampling_points` returns."""
    found = visualize.sampling_points(model, image, "reader", point)
    row, column = found.position
    output = np.asarray(model(image[None]))[0]
    read = output[row, column] if data_format == "channels_last" else output[:, row, column]
    expected = read.reshape(TAPS, 2) / found.mask[0, :, None]
    np.testing.assert_allclose(found.points[0], expected, rtol=1e-4, atol=1e-3)
    assert np.abs(found.points[0, :, ::-1] - expected).max() > 1  # swapping x and y would be detected
    return found


@pytest.mark.parametrize("stem", STEMS)
def test_coordinates_come_back(stem, rng):
    image = coordinates(160, 192)
    model = keras.Sequential([keras.Input((None, None, 2)), *STEMS[stem](), reader(rng)])
    check_reads_there(model, image, (70, 101))


@pytest.mark.parametrize(("strides", "dilation_rate"), [(2, 1), (1, 2), ((1, 3), 1)])
def test_coordinates_of_strided_and_dilated_taps(strides, dilation_rate, rng):
    image = coordinates(96, 112)
    model = keras.Sequential(
        [keras.Input((96, 112, 2)), box(3, 2, "same"), reader(rng, strides, dilation_rate)]
    )
    found = check_reads_there(model, image, (44, 61))
    spacing = 2 * np.array(strides if isinstance(strides, tuple) else (strides, strides))
    assert (np.abs(found.center - (44, 61)) <= spacing / 2).all()  # no other position is nearer


def test_coordinates_channels_first(rng):
    image = coordinates(48, 64, "channels_first")
    layers = [box(3, 2, "same", "channels_first"), reader(rng, data_format="channels_first")]
    model = keras.Sequential([keras.Input((2, 48, 64)), *layers])
    check_reads_there(model, image, (20, 41), "channels_first")


def test_the_drawn_points_are_the_coordinates(rng):
    image = coordinates(64, 96)
    model = keras.Sequential([keras.Input((64, 96, 2)), box(3, 2, "same"), reader(rng)])
    found = check_reads_there(model, image, (30, 55))
    axes = visualize.plot_sampling_points(model, image, "reader", (30, 55)).axes[0]
    off, on = axes.collections
    assert len(off.get_offsets()) == 0
    x, y = np.asarray(on.get_offsets()).T  # matplotlib uses (x, y)
    np.testing.assert_allclose(np.stack([y, x], -1), found.points[0])
    np.testing.assert_allclose(on.get_array(), found.mask[0])
    (cross,) = axes.lines
    np.testing.assert_allclose([cross.get_ydata()[0], cross.get_xdata()[0]], found.center)
    assert axes.get_xlim() == (-0.5, 95.5)
    assert axes.get_ylim() == (63.5, -0.5)  # row 0 is on top


def test_borders():
    """At the corner, five of the nine taps without offsets are out of bounds. Initial masks are 1/2."""
    model = keras.Sequential([keras.Input((16, 24, 3)), keras_das.DASLayer(name="gate")])
    found = visualize.sampling_points(model, np.zeros((16, 24, 3)), "gate", (-0.5, 23.5))
    assert found.position == (0, 23)
    np.testing.assert_array_equal(found.inside[0], [0, 0, 0, 1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(found.points[0, [0, 4, 8]], [[-1, 22], [0, 23], [1, 24]])
    np.testing.assert_allclose(found.mask, 0.5)


def test_a_gate_reads_where_its_offsets_say():
    model = attach_das(plain_cnn(), at="relu_0", dilation_rate=1, offset_scale=1)
    gate = model.get_layer("das_relu_0")
    image = np.zeros((1, 32, 32, 3))
    at_rest = visualize.sampling_points(model, image, gate, (17, 13))
    np.testing.assert_allclose(at_rest.center, [17, 13])  # 4 * (4, 3) + 1: the stem's window center
    np.testing.assert_allclose(at_rest.points[0, 4], at_rest.center)
    np.testing.assert_allclose(at_rest.points[0, 1], [13, 13])
    offsets = np.zeros((TAPS, 2))
    offsets[1] = [2, -1]  # two rows down, one column left
    set_offsets(gate.deform, offsets, np.zeros(TAPS))
    moved = visualize.sampling_points(model, image, "das_relu_0", (17, 13))
    np.testing.assert_allclose(moved.points[0, 1] - at_rest.points[0, 1], [8, -4], atol=1e-5)
    np.testing.assert_array_equal(np.delete(moved.points, 1, axis=1), np.delete(at_rest.points, 1, axis=1))


def test_offset_groups_and_no_mask():
    gate = keras_das.DASLayer(reduction=1, offset_groups=2, kernel_size=(1, 3), modulated=False)
    model = keras.Sequential([keras.Input((8, 8, 4)), gate])
    gate.deform.offset_bias.assign([0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0])  # second group: one row down
    found = visualize.sampling_points(model, np.zeros((8, 8, 4)), gate, (4, 4))
    np.testing.assert_allclose(found.points, [[[4, 3], [4, 4], [4, 5]], [[5, 3], [5, 4], [5, 5]]])
    np.testing.assert_array_equal(found.mask, 1)


def test_stacked_layers(rng, monkeypatch):
    layers = {}
    for name in ("first", "second"):
        layers[name] = keras_das.DASLayer(name=name, reduction=1, offset_initializer="random_normal")
    model = keras.Sequential(
        [keras.Input((64, 64, 2)), box(3, 2, "same"), layers["first"], box(3, 2, "same"), layers["second"]]
    )
    image = rng.normal(size=(64, 64, 2)).astype("float32")
    predictions = []
    predict = keras_das.DASLayer.predict_offsets

    def counted(layer, x):
        predictions.append(layer.name)
        return predict(layer, x)

    monkeypatch.setattr(keras_das.DASLayer, "predict_offsets", counted)
    found = visualize.stacked_sampling_points(model, image, ["second", "first"], (31, 33))
    monkeypatch.undo()
    assert found.points.shape == (1, 81, 2)
    outer = visualize.sampling_points(model, image, "second", (31, 33))
    for tap in (0, 5):
        at, mask = outer.points[0, tap], outer.mask[0, tap]
        inner = visualize.sampling_points(model, image, "first", at)
        mine = slice(9 * tap, 9 * tap + 9)
        np.testing.assert_allclose(found.points[0, mine], inner.points[0])
        np.testing.assert_allclose(found.mask[0, mine], mask * inner.mask[0], rtol=1e-6)
    np.testing.assert_array_equal(found.center, outer.center)
    for layer in layers.values():
        assert predictions.count(layer.name) == 1
    corner = visualize.stacked_sampling_points(model, image, ["first", "second"], (0, 0))
    alone = visualize.sampling_points(model, image, "second", (0, 0))
    assert not corner.inside[0].reshape(9, 9)[~alone.inside[0]].any()
    drawn = visualize.plot_sampling_points(model, image, ["first", "second"], (31, 33)).axes[0]
    assert sum(len(points.get_offsets()) for points in drawn.collections) == 81


# Receptive fields


def support(model, size, index):
    """The range of input pixels that affect one output pixel, derived from the gradient.

    All weights of the model must be positive.
    """

    # Compiled, because a graph omits the unused kernel gradients, which crash for odd sizes (TensorFlow
    # 2.21).
    @tf.function
    def gradient(image):
        return tf.gradients(model(image)[0, index[0], index[1]], image)[0]

    used = np.nonzero(np.abs(gradient(tf.ones((1, *size, 2))))[0].sum(-1))
    return [(along.min(), along.max()) for along in used]


def ones(filters, size, strides, padding, rate=1):
    return keras.layers.Conv2D(
        filters, size, strides, padding, dilation_rate=rate, kernel_initializer="ones", activation="relu"
    )


def branches(x):
    """A residual sum and a concatenation whose branches have different receptive fields."""
    x = keras.layers.Add()([ones(4, 3, 2, "same")(x), ones(4, 1, 2, "same")(x)])
    scale = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = keras.layers.Concatenate()([ones(2, (5, 1), 1, "same")(x), ones(2, (1, 3), 1, "same", 2)(x)])
    return keras.layers.Multiply()([y, keras.ops.stop_gradient(scale)])


@pytest.mark.parametrize("size", [(60, 72), (63, 71)])
def test_receptive_fields_by_the_gradient(size):
    """Covers inner feature maps, even and odd sizes, nested models, and padding by `keras.ops.pad`."""
    inputs = keras.Input((None, None, 2))
    x = keras.ops.pad(inputs, ((0, 0), (2, 0), (1, 3), (0, 0)))
    stem = keras.Sequential([keras.Input((None, None, 2)), ones(3, (7, 4), 2, "valid"), mean(2, 1, "same")])
    inner_inputs = keras.Input((None, None, 3))
    inner = keras.Model(inner_inputs, branches(inner_inputs))
    x = keras.layers.Activation("linear", name="end")(inner(stem(x)))
    model = keras.Model(inputs, x)
    from keras_das.visualize.fields import fields_of

    fields = fields_of(model, size, "channels_last")[id(model.get_layer("end"))].outputs
    index = (6, 8)
    assert model.compute_output_shape((1, *size, 2))[1:3] == tuple(axis.size for axis in fields)
    for axis, at, (low, high) in zip(fields, index, support(model, size, index), strict=True):
        assert (axis.low + at * axis.stride, axis.high + at * axis.stride) == (low, high)


def centers(model, image, layers):
    """The image position of pixel (0, 0) of each layer's input."""
    return [visualize.sampling_points(model, image, of, (-0.5, -0.5)).center.tolist() for of in layers]


GATES = ["das_p2", "das_p3", "das_p4", "das_p5"]
IMAGE = np.random.default_rng(0).uniform(0, 255, (64, 64, 3)).astype("float32")


def test_inside_keras_hub():
    """With PyTorch-style padding, the first pixel of every feature map is at the first pixel of the image."""
    keras_hub = pytest.importorskip("keras_hub")
    backbone = attach_das(hub_resnet(), **SMALL_GATE)
    model = keras_hub.models.ImageClassifier(backbone, num_classes=3)
    assert centers(model, IMAGE, GATES) == [[0, 0]] * 4
    deepest = visualize.sampling_points(model, IMAGE, "das_p5", (33, 30))
    assert deepest.position == (1, 1)
    np.testing.assert_array_equal(deepest.center, [32, 32])


def test_inside_keras_cv():
    """With TensorFlow-style padding, each stride of 2 shifts the first pixel.

    The detector is a subclassed model.
    """
    keras_cv = pytest.importorskip("keras_cv")
    backbone = attach_das(
        cv_resnet(block_type="basic_block", stackwise_filters=[64, 16, 16, 16]), **SMALL_GATE
    )
    expected = [[stride - 1] * 2 for stride in (4, 8, 16, 32)]
    classifier = keras_cv.models.ImageClassifier(backbone=backbone, num_classes=2)
    assert centers(classifier, IMAGE, GATES) == expected
    detector = keras_cv.models.RetinaNet(backbone, num_classes=2, bounding_box_format="xyxy")
    detector.build((None, 64, 64, 3))
    assert centers(detector, IMAGE, GATES[1:]) == expected[1:]


def test_inside_a_sequential_model():
    backbone = attach_das(plain_cnn())
    pixels = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.Resizing(32, 32), backbone])
    alone = centers(backbone, IMAGE[:32, :32], ["das_p2"])
    assert alone == [[1, 1]]
    # Pixel 1 of the 32x32 image covers pixels 2 and 3 of the 64x64 image.
    assert centers(pixels, IMAGE, ["das_p2"]) == [[2.5, 2.5]]
    assert visualize.gate_map(pixels, IMAGE, "das_p3").shape == (4, 4)


# Gates and Grad-CAM


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_gate_map(data_format, rng):
    # Pooling, because channels-first Conv2D is available only on some CPUs.
    pooling = keras.layers.AveragePooling2D(8, data_format=data_format, name="pooled")
    gate = keras_das.DASLayer(reduction=1, data_format=data_format, name="gate")
    shape = (32, 40, 3) if data_format == "channels_last" else (3, 32, 40)
    model = keras.Sequential([keras.Input(shape), pooling, gate])
    randomize(model, rng)
    image = rng.normal(size=shape).astype("float32")
    tensors = [pooling.output, gate.output]
    before, after = (np.array(x)[0] for x in keras.Model(model.inputs, tensors)(image[None]))
    if data_format == "channels_first":
        before, after = (np.moveaxis(x, 0, -1) for x in (before, after))
    values = visualize.gate_map(model, image, "gate", reduce=None)
    assert values.shape == (4, 5, 3)
    np.testing.assert_allclose(values * before, after, rtol=1e-5, atol=1e-6)
    mean = visualize.gate_map(model, image, "gate", reduce="mean")
    np.testing.assert_allclose(mean, values.mean(-1), rtol=1e-5)
    # The share of the input that the gate keeps, or the mean where the input is 0.
    before[0, 0], before[1, 1] = 0, 1
    total, kept = np.abs(before).sum(-1), np.abs(values * before).sum(-1)
    share = np.where(total > 0, kept / np.maximum(total, 1e-9), mean)
    np.testing.assert_allclose(reduce_channels(values, before, "share"), share, rtol=1e-5)
    assert share[0, 0] == mean[0, 0]
    found = visualize.gate_map(model, image, "gate")
    np.testing.assert_allclose(found[2:], share[2:], rtol=1e-5)


def test_gate_inputs(rng):
    backbone = attach_das(plain_cnn())
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), backbone])
    images = rng.uniform(0, 255, (3, 32, 32, 3)).astype("float32")
    (first, x), (second, y) = visualize.gate_inputs(model, images)
    assert [first.name, second.name] == ["das_p2", "das_p3"]
    expected = keras.Model(backbone.input, [first.input, second.input])(images / 255)
    np.testing.assert_allclose(x, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, expected[1], rtol=1e-5, atol=1e-6)
    assert visualize.gate_inputs(plain_cnn(), images) == []


def classifier(data_format="channels_last"):
    """A model whose scores are a matrix times the mean of each channel of the image."""
    shape = (6, 5, 3) if data_format == "channels_last" else (3, 6, 5)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(shape),
            layers.AveragePooling2D(1, data_format=data_format, name="features"),
            layers.GlobalAveragePooling2D(data_format=data_format),
            layers.Dense(2, use_bias=False),
        ]
    )
    model.layers[-1].set_weights([WEIGHTS])
    return model


WEIGHTS = np.array([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.0]], "float32")


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_grad_cam(data_format, rng):
    image = rng.normal(size=(6, 5, 3)).astype("float32")
    given = image if data_format == "channels_last" else np.moveaxis(image, -1, 0)
    model = classifier(data_format)
    for index in (0, 1):
        expected = np.maximum(image @ WEIGHTS[:, index], 0)
        found = visualize.grad_cam(model, given, "features", index)
        np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-5, atol=1e-6)
    best = int(np.argmax(image.mean(axis=(0, 1)) @ WEIGHTS))
    np.testing.assert_array_equal(
        visualize.grad_cam(model, given, "features"), visualize.grad_cam(model, given, "features", best)
    )
    # The temporarily replaced `call` is restored.
    assert "call" not in vars(model.get_layer("features"))


def test_grad_cam_of_gradients_that_differ_by_place(rng):
    """The weight of a channel is the mean of its gradients over all positions."""
    image = rng.normal(size=(6, 5, 3)).astype("float32")
    layers = [
        keras.layers.AveragePooling2D(1, name="features"),
        keras.layers.Flatten(),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.Input(image.shape), *layers])
    by_place = np.reshape(model.layers[-1].get_weights()[0], (6, 5, 3, 2))
    expected = np.maximum(image @ by_place[..., 1].mean(axis=(0, 1)), 0)
    found = visualize.grad_cam(model, image, "features", 1)
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-4, atol=1e-5)


def test_grad_cam_in_float16_of_a_confident_prediction(rng):
    """Gradients that are smaller than the smallest float16 do not become 0."""
    image = rng.normal(size=(28, 28, 3)).astype("float32")
    other, best = np.sort(np.maximum(image, 0).mean(axis=(0, 1)) @ WEIGHTS)
    confident = 11 / (best - other) * WEIGHTS
    maps = {}
    for policy in ("float32", "mixed_float16"):
        layers = [keras.layers.ReLU(name="features", dtype=policy)]
        layers += [keras.layers.GlobalAveragePooling2D(dtype=policy), keras.layers.Dense(2, "softmax")]
        model = keras.Sequential([keras.Input(image.shape), *layers])
        model.layers[-1].set_weights([confident, np.zeros(2, "float32")])
        maps[policy] = visualize.grad_cam(model, image, "features")
    assert 1e-6 < 1 - model(image[None]).numpy().max() < 1e-4
    np.testing.assert_allclose(maps["mixed_float16"], maps["float32"], atol=2e-2)


def test_grad_cam_of_a_layer_that_is_called_with_a_keyword(rng):
    image = keras.Input((6, 5, 3))
    features = keras.layers.AveragePooling2D(1, name="features")
    pooled = keras.layers.GlobalAveragePooling2D()(features(inputs=image))
    model = keras.Model(image, keras.layers.Dense(2, use_bias=False)(pooled))
    model.layers[-1].set_weights([WEIGHTS])
    pixels = rng.normal(size=(6, 5, 3)).astype("float32")
    expected = visualize.grad_cam(classifier(), pixels, "features", 0)
    np.testing.assert_allclose(visualize.grad_cam(model, pixels, "features", 0), expected, rtol=1e-5)


class Undifferentiable(keras.layers.Dense):
    """A layer with weights whose gradient is an error."""

    def call(self, inputs):
        @tf.custom_gradient
        def same(x):
            def gradient(upstream):
                raise AssertionError("differentiated")

            return tf.identity(x), gradient

        return same(super().call(inputs))


def test_grad_cam_differentiates_only_what_follows_the_layer(rng):
    layers = [Undifferentiable(3), keras.layers.Conv2D(3, 1, name="features"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 5, 3)), *layers, keras.layers.Dense(2)])
    image = rng.normal(size=(6, 5, 3)).astype("float32")
    assert visualize.grad_cam(model, image, "features", 1).shape == (6, 5)


def test_grad_cam_of_nothing():
    """Returns zeros instead of 0/0 if no pixel supports the class."""
    image = np.zeros((6, 5, 3), "float32") + [0, 0, 1]
    assert (visualize.grad_cam(classifier(), image, "features", 0) == 0).all()


def test_grad_cam_reaches_into_nested_models(rng):
    gated = attach_das(plain_cnn(), at=["relu_1"])
    model = keras.Sequential([keras.Input((32, 32, 3)), gated])
    image = rng.normal(size=(32, 32, 3)).astype("float32")
    found = visualize.grad_cam(model, image, "das_relu_1", 1)
    np.testing.assert_allclose(found, visualize.grad_cam(plain_like(gated), image, "relu_1", 1), atol=1e-5)


def plain_like(gated):
    """The model without gates and with the same weights. Gates with value 1 do not change the outputs."""
    plain = plain_cnn(size=None)
    for layer in plain.layers:
        layer.set_weights(gated.get_layer(layer.name).get_weights())
    return plain


@pytest.mark.slow
def test_on_jax(tmp_path, rng):
    """Sampling points, gate maps, and Grad-CAM agree with TensorFlow's."""
    gate = {"kernel_size": (1, 2), "offset_initializer": "random_normal"}
    model = attach_das(plain_cnn(), at="relu_1", identity_init=False, **gate)
    image = rng.normal(size=(32, 32, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "image.npy", image)
    script = """
        import sys, keras, numpy as np
        from keras_das import visualize
        assert keras.backend.backend() == "jax"
        model = keras.models.load_model("model.keras")
        image = np.load("image.npy")
        np.savez(
            "found.npz",
            points=visualize.sampling_points(model, image, "das_relu_1", (9, 20)).points,
            gate=visualize.gate_map(model, image, "das_relu_1"),
            cam=visualize.grad_cam(model, image, "das_relu_1", 1),
        )
    """
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path, env=environment)
    with np.load(tmp_path / "found.npz") as found:
        points = visualize.sampling_points(model, image, "das_relu_1", (9, 20)).points
        np.testing.assert_allclose(found["points"], points, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found["gate"], visualize.gate_map(model, image, "das_relu_1"), rtol=1e-4)
        np.testing.assert_allclose(found["cam"], visualize.grad_cam(model, image, "das_relu_1", 1), atol=1e-3)


# Figures


def gated_by(values):
    """A model with one gate with the given values, of shape (h, w, channels), between 0 and 2."""
    model = keras.Sequential([keras.Input(values.shape), keras_das.DASLayer(identity_init=True, name="gate")])
    gate = model.layers[0]
    gate.gate = lambda x: keras.ops.convert_to_tensor(np.broadcast_to(values, x.shape).astype("float32"))
    return model


def test_gate_statistics(rng):
    values = rng.uniform(0, 2, (4, 6, 3))
    (found,) = visualize.gate_statistics(gated_by(values), np.ones((2, 4, 6, 3), "float32"))
    expected = ("gate", values.mean(), values.std(), values.mean(-1).std())
    assert found._asdict() == pytest.approx(dict(zip(found._fields, expected, strict=True)))
    first = keras_das.DASLayer(data_format="channels_first", name="first")
    model = keras.Sequential([keras.Input((3, 4, 6)), first])
    first.gate = lambda x: keras.ops.convert_to_tensor(np.moveaxis(values, -1, 0)[None].astype("float32"))
    (found,) = visualize.gate_statistics(model, np.ones((1, 3, 4, 6), "float32"))
    assert found.spatial_deviation == pytest.approx(values.mean(-1).std())


def _epochs(callback, model, count):
    callback.set_model(model)
    for epoch in range(count):
        callback.on_epoch_end(epoch)
    callback.on_train_end()


def test_monitor(rng, capsys, tmp_path):
    values = rng.uniform(0.5, 1.5, (4, 6, 3))
    images = np.ones((2, 4, 6, 3), "float32")
    model = gated_by(values)
    monitor = visualize.GateMonitor(images, tmp_path)
    _epochs(monitor, model, 2)
    assert [gate.deviation for gate in monitor.history["gate"]] == pytest.approx([values.std()] * 2)
    assert "of 1" not in capsys.readouterr().out
    assert list(tmp_path.glob("events*"))
    idle = gated_by(1 + 0.005 * (values - 1))
    _epochs(visualize.GateMonitor(images), idle, 1)
    assert "Gates within 2% of 1: gate." in capsys.readouterr().out


def test_monitor_of_gates_with_the_same_names():
    def part():
        return [keras_das.DASLayer(name=name) for name in ("gate", "gate_1")]

    model = keras.Sequential([keras.Input((8, 8, 4)), keras.Sequential(part()), keras.Sequential(part())])
    monitor = visualize.GateMonitor(np.ones((1, 8, 8, 4), "float32"))
    _epochs(monitor, model, 2)
    assert [len(measured) for measured in monitor.history.values()] == [2, 2, 2, 2]
    assert list(monitor.history)[:2] == ["gate", "gate_1"]


def test_plot_gates(rng):
    model = attach_das(plain_cnn())
    images = rng.uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    figure = visualize.plot_gates(model, images, point=(16, 12), labels=["a", "b"])
    grid = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert [axes.get_ylabel() for axes in grid] == ["a", "", "", "b", "", ""]
    assert [axes.get_title() for axes in grid[:3]] == [
        "",
        "das_p2, 8x8\n1.00 ± 0.00",
        "das_p3, 4x4\n1.00 ± 0.00",
    ]
    assert all(axes.images[1].get_clim() == (0, 2) for axes in grid[1:3])
    np.testing.assert_array_equal(grid[2].images[1].get_array(), np.ones((32, 32)))
    (points,) = grid[5].collections
    found = visualize.sampling_points(model, images[1], "das_p3", (16, 12))
    np.testing.assert_allclose(points.get_offsets()[:, ::-1], found.points[found.inside])
    np.testing.assert_allclose(grid[3].images[0].get_array(), images[1] / 255)


def test_plot_grad_cam(rng, tmp_path):
    gated = attach_das(plain_cnn(size=None), at=["relu_1"], **SMALL_GATE)
    image = rng.uniform(-1, 1, (32, 48, 3)).astype("float32")
    models = {"without": (plain_like(gated), "relu_1"), "with DAS": (gated, "das_relu_1")}
    figure = visualize.plot_grad_cam(models, image, class_index=1)
    first, plain, das, _ = figure.axes
    shown = first.images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1)  # images with negative values are stretched to the full range
    assert plain.get_title() == "without\nrelu_1"
    cam = visualize.grad_cam(gated, image, "das_relu_1", 1)
    # Map pixel (row, column) is at image position 8 * (row, column) + 5. Values beyond the outermost map
    # pixels are constant.
    spread = np.asarray(das.images[1].get_array())
    np.testing.assert_allclose(spread[5::8, 5::8], cam, atol=1e-6)
    np.testing.assert_allclose(spread[9, 13], (cam[0, 1] + cam[1, 1]) / 2, atol=1e-6)
    np.testing.assert_allclose(spread[0, :6], cam[0, 0], atol=1e-6)
    figure.savefig(tmp_path / "cam.png")
    assert (tmp_path / "cam.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_something_else_than_pixels(rng):
    """`picture` replaces the model's input in figures."""
    model = keras.Sequential([keras.Input((8, 8, 4)), keras_das.DASLayer(name="gate")])
    image = rng.normal(size=(8, 8, 4))
    picture = rng.integers(0, 255, (8, 8, 3)).astype("uint8")
    axes = visualize.plot_sampling_points(model, image, "gate", (4, 4), picture).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), picture / 255)
    black = visualize.plot_sampling_points(model, image, "gate", (4, 4), np.full((8, 8), -1.0)).axes[0]
    np.testing.assert_array_equal(black.images[0].get_array(), 0)
    with pytest.raises(ValueError, match=r"`picture` must have the shape \(8, 8\) or \(8, 8, 3\)"):
        visualize.plot_sampling_points(model, image, "gate", (4, 4), picture[:4])


def test_plot_history(tmp_path):
    (tmp_path / "a.csv").write_text("epoch,loss,val_loss,note\n0,3.0,4.0,x\n1,2.0,,y\n2,1.0,NA,z\n")
    (tmp_path / "b.csv").write_text("epoch,accuracy,loss\n0,0.5,1.0\n")
    files = {"a": tmp_path / "a.csv", "b": tmp_path / "b.csv"}
    figure = visualize.plot_history(files)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["a", "a, validation", "b"]
    np.testing.assert_array_equal(lines["a"].get_xydata(), [[0, 3], [1, 2], [2, 1]])
    np.testing.assert_array_equal(lines["a, validation"].get_ydata(), [4, np.nan, np.nan])
    assert len(visualize.plot_history(files, ["accuracy"]).axes) == 1
    with pytest.raises(ValueError, match=r"`metrics` must be among \['loss', 'accuracy'\]"):
        visualize.plot_history(files, ["recall"])
    (tmp_path / "c.csv").write_text("step,loss\n0,1.0\n")
    with pytest.raises(ValueError, match=r"numbers in the column 'epoch'.*c\.csv"):
        visualize.plot_history({"c": tmp_path / "c.csv"})


def test_tensorboard(tmp_path, rng):
    model = attach_das(plain_cnn(), **SMALL_GATE)
    images = rng.uniform(0, 1, (2, 32, 32, 3)).astype("float32")
    figures = visualize.TensorBoardFigures(tmp_path, images, every=2)
    callbacks = keras.callbacks.CallbackList([figures], model=model)
    callbacks.on_train_begin()
    for epoch in range(5):
        callbacks.on_epoch_end(epoch)
    callbacks.on_train_end()
    seen = {}
    for path in tmp_path.iterdir():
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                seen.setdefault(value.tag, {})[event.step] = value.tensor.string_val
    assert set(seen) == {"gates", "sampling_points/das_p2", "sampling_points/das_p3"}
    for steps in seen.values():
        assert sorted(steps) == [1, 3]  # after the second and the fourth epoch
        width, height, png = steps[1]
        assert tf.io.decode_png(png).shape[:2] == (int(height), int(width))
    bare = keras.callbacks.CallbackList([figures], model=plain_cnn())
    with pytest.raises(ValueError, match="`model` must have gates"):
        bare.on_train_begin()
    with pytest.raises(ValueError, match=r"`every` must be a positive integer. Received: every=0"):
        visualize.TensorBoardFigures(tmp_path, images, every=0)


# Errors


def test_bad_arguments():
    model = attach_das(plain_cnn(), **SMALL_GATE)
    image = np.zeros((32, 32, 3), "float32")

    def points(of=model, image=image, layer="das_p2", point=(1, 1)):
        return visualize.sampling_points(of, image, layer, point)

    with pytest.raises(
        ValueError, match=r"`layer` must be a DASLayer or DeformableConv2D.*'das_p2', 'das_p3'"
    ):
        points(layer="relu_0")
    with pytest.raises(ValueError, match="Received: layer='deform'"):
        points(layer="deform")  # a sublayer of the gate
    for wrong in [(1, 2, 3), (-1, 0), (0, 31.6), (float("nan"), 0)]:
        with pytest.raises(ValueError, match=r"`point` must be \(y, x\) .*Received: point="):
            points(point=wrong)
    for wrong in [(2, 32, 32, 3), (32, 32)]:
        with pytest.raises(ValueError, match=r"`image` must have the shape .*Received: image.shape="):
            points(image=np.zeros(wrong))
    with pytest.raises(ValueError, match="`model` must be a Keras model that has been built"):
        points(of="model.keras")
    with pytest.raises(ValueError, match="`layers` must be a layer or name, or a sequence"):
        visualize.stacked_sampling_points(model, image, [], (1, 1))
    with pytest.raises(ValueError, match="`reduce` must be"):
        visualize.gate_map(model, image, "das_p2", reduce="max")
    with pytest.raises(ValueError, match="`layer` must be a DASLayer of the model"):
        visualize.gate_map(model, image, "relu_0")
    with pytest.raises(ValueError, match="`class_index` must be an integer from 0 to 2"):
        visualize.grad_cam(model, image, "das_p2", 3)
    with pytest.raises(ValueError, match="`layer` must return a feature map"):
        visualize.grad_cam(model, image, "pool", 0)
    with pytest.raises(ValueError, match="`labels` must contain one value for each of 1 images"):
        visualize.plot_gates(model, [image], labels=["a", "b"])
    with pytest.raises(ValueError, match="`model` must contain gates"):
        visualize.plot_gates(plain_cnn(), [image])
    with pytest.raises(ValueError, match="`models` must be a dict with at least one model"):
        visualize.plot_grad_cam({}, image)


def test_a_layer_that_is_called_twice():
    shared = keras_das.DASLayer(name="gate")
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, shared(shared(inputs)))
    with pytest.raises(ValueError, match=r"must be called once.*'gate', which is called 2 times"):
        visualize.sampling_points(model, np.zeros((8, 8, 4)), "gate", (0, 0))


def test_a_model_of_two_inputs():
    inputs = [keras.Input((8, 8, 4)), keras.Input((8, 8, 4))]
    model = keras.Model(inputs, keras_das.DASLayer(name="gate")(keras.layers.Add()(inputs)))
    with pytest.raises(
        ValueError, match="`image` must be a list or dict with an array for each of the inputs"
    ):
        visualize.gate_map(model, np.zeros((8, 8, 4)), "gate")


def test_an_input_that_has_a_name():
    inputs = {"image": keras.Input((8, 8, 4), name="image")}
    model = keras.Model(inputs, keras_das.DASLayer(name="gate")(inputs["image"]))
    assert visualize.gate_map(model, np.zeros((8, 8, 4)), "gate").shape == (8, 8)


def test_a_name_that_two_layers_have():
    def part():
        return keras.Sequential([keras.Input((8, 8, 4)), keras_das.DASLayer(name="gate")])

    model = keras.Sequential([keras.Input((8, 8, 4)), part(), part()])
    with pytest.raises(ValueError, match="2 have this name"):
        visualize.gate_map(model, np.zeros((8, 8, 4)), "gate")
    first = model.layers[0].layers[0]
    assert visualize.gate_map(model, np.zeros((8, 8, 4)), first).shape == (8, 8)


def test_a_layer_outside_the_graph():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.gate = keras_das.DASLayer(name="gate")

        def build(self, shape):
            self.gate.build(shape)

        def call(self, x):
            return self.gate(x)

    model = keras.Sequential([keras.Input((8, 8, 4)), Block()])
    assert visualize.gate_map(model, np.zeros((8, 8, 4)), "gate").shape == (8, 8)
    with pytest.raises(ValueError, match=r"`layer` must belong to a functional or sequential.*\['gate'\]"):
        visualize.sampling_points(model, np.zeros((8, 8, 4)), "gate", (0, 0))


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_missing_packages(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"requires {package}: pip install 'keras-das\[viz\]'"):
        visualize.TensorBoardFigures("logs", [])
