"""Tests of SavedModel extras: labels, a signature for encoded images, and warmup requests."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_log_pb2

import keras_das
from keras_das.exporters.saved_model import Serving, custom_operations
from tests.models.backbones import randomize

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


def classifier(classes=7, size=(24, 32), data_format="channels_last"):
    shape = (*size, 3) if data_format == "channels_last" else (3, *size)
    # Channels-first Conv2D is available only on some CPUs.
    convolution = keras.layers.Conv2D if data_format == "channels_last" else keras_das.DeformableConv2D
    layers = [
        convolution(4, 3, 2, data_format=data_format),
        keras_das.DASLayer(kernel_size=1, data_format=data_format),  # one tap traces faster
        keras.layers.GlobalAveragePooling2D(data_format=data_format),
        keras.layers.Dense(classes, "softmax"),
    ]
    return keras.Sequential([keras.Input(shape, name="image"), *layers])


def simple(classes=7, size=(24, 32)):
    """A model without a gate, for tests that do not depend on the layers."""
    layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(classes, "softmax")]
    return keras.Sequential([keras.Input((*size, 3), name="image"), *layers])


@pytest.fixture(scope="module")
def model():
    model = classifier()
    randomize(model, np.random.default_rng(1))
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """The folder of the model exported with all extras, and the loaded SavedModel."""
    folder = tmp_path_factory.mktemp("animals") / "1"
    keras_das.export(model, folder, labels=NAMES, serving_bytes=True, warmup=(1, 3))
    return folder, tf.saved_model.load(folder)


def photograph(rng, size=(24, 32)):
    """Pixels from 0 to 255 with large features, which survive resizing and JPEG compression."""
    coarse = rng.integers(0, 255, (4, 4, 3)).astype("uint8")
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def encode(pixels, format):
    file = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def preprocessing(images):
    return images / 127.5 - 1


def top(scores, count):
    """The indices of the best classes, best first."""
    return np.argsort(-scores, axis=1)[:, :count]


def test_labels(model, exported, rng):
    folder, loaded = exported
    assert custom_operations(folder) == []
    images = rng.normal(size=(6, 24, 32, 3)).astype("float32")
    served = loaded.signatures["serving_default"](image=images)
    scores = model(images).numpy()
    np.testing.assert_allclose(served["output_0"], scores, rtol=1e-5, atol=1e-6)
    best = top(scores, 5)
    assert [[name.decode() for name in row] for row in served["labels"].numpy()] == np.array(NAMES)[
        best
    ].tolist()
    np.testing.assert_allclose(served["scores"], np.take_along_axis(scores, best, 1), rtol=1e-5, atol=1e-6)


def test_labels_of_two_classes(tmp_path, rng):
    """Exports labels without the other extras."""
    model = simple(2)
    keras_das.export(model, tmp_path / "1", labels=["no", "yes"])
    loaded = tf.saved_model.load(tmp_path / "1")
    assert set(loaded.signatures) == {"serve", "serving_default"}
    served = loaded.serve(rng.normal(size=(3, 24, 32, 3)).astype("float32"))
    assert served["labels"].shape == (3, 2)


def check_png_files(model, signature, rng):
    """Checks the outputs for PNG files of the model's input size, which need no resizing."""
    pictures = [photograph(rng) for _ in range(2)]
    images = np.stack(pictures).astype("float32")
    if model.input_shape[1] == 3:
        images = np.moveaxis(images, 3, 1)
    scores = model(images).numpy()
    served = signature(image_bytes=tf.constant([encode(pixels, "PNG") for pixels in pictures]))
    np.testing.assert_allclose(served["output_0"], scores, rtol=1e-4, atol=1e-5)
    assert served["labels"][0, 0].numpy().decode() == NAMES[scores[0].argmax()]


def test_image_files(model, exported, rng):
    check_png_files(model, exported[1].signatures["serving_bytes"], rng)


@pytest.mark.slow
def test_image_files_of_channels_first(tmp_path, rng):
    model = classifier(data_format="channels_first")
    randomize(model, rng)
    keras_das.export(model, tmp_path / "1", labels=NAMES, serving_bytes=True)
    assert custom_operations(tmp_path / "1") == []
    check_png_files(model, tf.saved_model.load(tmp_path / "1").signatures["serving_bytes"], rng)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_large_jpeg_files(data_format, tmp_path, rng):
    """JPEG files, resized to the model's input size, match the pictures within a few of 255 levels."""
    shape = (24, 32, 3) if data_format == "channels_last" else (3, 24, 32)
    model = keras.Sequential([keras.Input(shape), keras.layers.Rescaling(1.0)])  # returns its inputs
    keras_das.export(model, tmp_path / "1", serving_bytes=True)
    pictures = [photograph(rng) for _ in range(3)]
    large = [np.kron(pixels, np.ones((2, 2, 1), "uint8")) for pixels in pictures]
    loaded = tf.saved_model.load(tmp_path / "1")
    served = loaded.serving_bytes(tf.constant([encode(pixels, "JPEG") for pixels in large]))["output_0"]
    if data_format == "channels_first":
        served = np.moveaxis(served, 1, 3)
    differences = np.abs(served - np.stack(pictures))
    assert differences.max() < 16
    assert differences.mean() < 2


def test_preprocessing_and_a_size_for_a_model_of_any(tmp_path, rng):
    layers = [keras.layers.Conv2D(2, 3), keras.layers.GlobalMaxPooling2D()]
    model = keras.Sequential([keras.Input((None, None, 3)), *layers])
    keras_das.export(
        model, tmp_path / "1", serving_bytes=True, image_size=(20, 28), preprocessing=preprocessing
    )
    pixels = photograph(rng, (20, 28))
    gray = np.array(Image.fromarray(pixels).convert("L"))
    loaded = tf.saved_model.load(tmp_path / "1")
    served = loaded.serving_bytes(tf.constant([encode(pixels, "PNG"), encode(gray, "PNG")]))
    images = np.stack([pixels, np.repeat(gray[..., None], 3, -1)]).astype("float32")
    wanted = model(preprocessing(images))
    np.testing.assert_allclose(served["output_0"], wanted, rtol=1e-4, atol=1e-5)


def test_warmup_requests(exported):
    """The requests can be parsed by tensorflow-serving-api, and the signatures accept them."""
    folder, loaded = exported
    records = tf.data.TFRecordDataset(str(folder / "assets.extra" / "tf_serving_warmup_requests"))
    seen = []
    for record in records:
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        assert log.WhichOneof("log_type") == "predict_log"
        request = log.predict_log.request
        name = request.model_spec.signature_name
        inputs = {key: tf.constant(tf.make_ndarray(value)) for key, value in request.inputs.items()}
        outputs = loaded.signatures[name](**inputs)
        seen.append((name, *inputs, len(outputs["labels"])))
    assert seen == [
        ("serving_default", "image", 1),
        ("serving_default", "image", 3),
        ("serving_bytes", "image_bytes", 1),
        ("serving_bytes", "image_bytes", 3),
    ]


def test_warmup_of_channels_first_models_of_any_size(tmp_path):
    layers = [keras.layers.GlobalAveragePooling2D(data_format="channels_first"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3, None, None)), *layers])
    keras_das.export(model, tmp_path / "1", serving_bytes=True, image_size=(16, 24), warmup=(2,))
    records = tf.data.TFRecordDataset(str(tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests"))
    first = prediction_log_pb2.PredictionLog.FromString(next(iter(records)).numpy())
    (images,) = first.predict_log.request.inputs.values()
    assert tf.make_ndarray(images).shape == (2, 3, 16, 24)


def test_names_and_batches_of_signatures(tmp_path):
    """TensorFlow changes names of inputs that Python does not accept. A fixed batch is not kept."""
    inputs = keras.Input(batch_shape=(4, 8, 6, 3), name="1-image")
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(inputs)))
    keras_das.export(model, tmp_path / "1", labels=["a", "b"], warmup=(1,))
    signature = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    records = tf.data.TFRecordDataset(str(tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests"))
    first = prediction_log_pb2.PredictionLog.FromString(next(iter(records)).numpy())
    ((name, images),) = first.predict_log.request.inputs.items()
    assert signature(**{name: tf.constant(tf.make_ndarray(images))})["output_0"].shape == (1, 2)


def test_warmup_of_models_of_any_size(tmp_path):
    model = simple(size=(None, None))
    keras_das.export(model, tmp_path / "1", image_size=(8, 6), warmup=(2,))
    records = tf.data.TFRecordDataset(str(tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests"))
    first = prediction_log_pb2.PredictionLog.FromString(next(iter(records)).numpy())
    (images,) = first.predict_log.request.inputs.values()
    assert tf.make_ndarray(images).shape == (2, 8, 6, 3)


def test_pixels_are_rounded_for_models_of_integers(tmp_path, rng):
    model = keras.Sequential([keras.Input((24, 32, 3), dtype="uint8"), keras.layers.Rescaling(1.0)])
    keras_das.export(model, tmp_path / "1", serving_bytes=True)
    pixels = photograph(rng, (48, 64))
    served = tf.saved_model.load(tmp_path / "1").serving_bytes(tf.constant([encode(pixels, "PNG")]))
    expected = tf.round(tf.image.resize(pixels, (24, 32), antialias=True))
    np.testing.assert_array_equal(served["output_0"][0], expected)


def test_options_as_other_sequences():
    options = Serving(labels=np.array(NAMES), warmup=np.array([1, 3]))
    assert options.labels == tuple(NAMES)
    assert options.warmup == (1, 3)
    assert not options.is_plain()
    assert Serving(warmup=[]).is_plain()
    assert Serving(serving_bytes=True, image_size=24).image_size == (24, 24)


def test_bad_arguments(tmp_path):
    model = simple()

    def export(model=model, path=tmp_path / "1", **arguments):
        keras_das.export(model, path, **arguments)

    with pytest.raises(ValueError, match=r"`labels` must contain a string for each class .*Received: 2"):
        export(labels=["a", "b"])
    with pytest.raises(ValueError, match=r"`labels` must contain a string for each .*Received: \(0, 1"):
        export(labels=range(7))
    with pytest.raises(ValueError, match="`image_size` requires serving_bytes=True or `warmup`"):
        export(image_size=(24, 32))
    with pytest.raises(
        ValueError, match=r"`image_size` must be \(rows, columns\).*Received: image_size=\(8, 8\)"
    ):
        export(serving_bytes=True, image_size=(8, 8))
    with pytest.raises(ValueError, match=r"`image_size` must be .*Received: image_size=None"):
        export(simple(size=(None, None)), serving_bytes=True)
    with pytest.raises(ValueError, match=r"`warmup` must be a positive integer. Received: warmup=0"):
        export(warmup=(0,))
    with pytest.raises(ValueError, match="`warmup` requires a model of images of one size"):
        export(simple(size=(None, None)), warmup=(1,))
    subclass = type("Subclass", (keras.Model,), {"call": lambda self, images: images})()
    subclass(np.zeros((1, 7)))
    with pytest.raises(ValueError, match="must be a functional or sequential model with one input"):
        export(subclass, labels=NAMES)
    with pytest.raises(
        ValueError, match='`labels`, `serving_bytes` and `warmup` require format="saved_model"'
    ):
        export(path=tmp_path / "1.onnx", format="onnx", labels=NAMES)
    vectors = keras.Sequential([keras.Input((4,)), keras.layers.Dense(7)])
    with pytest.raises(ValueError, match="`serving_bytes` requires a model of images with 3 channels"):
        export(vectors, serving_bytes=True)
    assert list(tmp_path.iterdir()) == []
