"""ONNX: one `DeformConv` for each deformable convolution, and onnxruntime's numbers are Keras'."""

import sys

import keras
import numpy as np
import onnx
import onnxruntime
import pytest

import keras_das
from tests import oracle
from tests.exporters.conftest import assert_close, many_convolutions


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path)
    assert {value.name for value in session.get_inputs()} == set(inputs)
    (output,) = session.run(["output_0"], inputs)
    return output


def run_only(path, images):
    """Runs a model of one input, whatever its name."""
    (name,) = (value.name for value in onnx.load(path).graph.input)
    return run(path, **{name: images})


@pytest.fixture(scope="module")
def exported_operation(tmp_path_factory):
    """A model that is one operation, its ONNX file, and the shapes of its inputs."""
    rng = np.random.default_rng(4)
    shapes = {"x": (1, 6, 7, 4), "offsets": (1, 6, 7, 18), "mask": (1, 6, 7, 9)}
    x, offsets, mask = (keras.Input(shape[1:], name=name) for name, shape in shapes.items())
    kernel = rng.normal(size=(3, 3, 4, 2)).astype("float32")
    outputs = keras_das.ops.deformable_conv2d(x, kernel, offsets, mask, padding="same")
    model, path = keras.Model([x, offsets, mask], outputs), tmp_path_factory.mktemp("onnx") / "model.onnx"
    keras_das.export(model, path, format="onnx")
    return model, path, shapes


@pytest.fixture
def operation(exported_operation, rng):
    """Model and file, and values for the inputs."""
    model, path, shapes = exported_operation
    return model, path, {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def deform_convs(path):
    """The nodes, of a file that holds ONNX's own operations only, none of them a loop over taps."""
    model = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Loop", "Scan", "GatherND"})
    return [node for node in model.graph.node if node.op_type == "DeformConv"]


@pytest.mark.slow
def test_resnet18_with_four_gates(resnet18, expected, tmp_path):
    path = tmp_path / "model.onnx"
    keras_das.export(resnet18, path, format="onnx")
    assert len(deform_convs(path)) == 4
    for images, outputs in expected:
        assert_close(run(path, image=images), outputs)


def test_every_kind_of_convolution(tmp_path, rng):
    model, count = many_convolutions()
    path = tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    assert len(deform_convs(path)) == count
    for shape in [(2, 32, 32, 3), (1, 37, 45, 3)]:
        images = rng.normal(size=shape).astype("float32")
        assert_close(run(path, image=images), model(images).numpy())


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_borders(data_format, tmp_path, rng):
    """Samples between the pixels, on them, on the border and off the image, by the oracle."""
    shapes = {"x": (2, 6, 7, 4), "offsets": (2, 6, 7, 36), "mask": (2, 6, 7, 18)}
    values = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    values["offsets"] *= 4
    values["offsets"][:, :3] = np.round(values["offsets"][:, :3])
    kernel = rng.normal(size=(3, 3, 2, 6)).astype("float32")
    first = data_format == "channels_first"
    given = {name: np.moveaxis(x, 3, 1) if first else x for name, x in values.items()}
    x, offsets, mask = (keras.Input(given[name].shape[1:], name=name) for name in shapes)
    arguments = {"padding": "same", "offset_groups": 2, "data_format": data_format}
    outputs = keras_das.ops.deformable_conv2d(x, kernel, offsets, mask, **arguments)
    path = tmp_path / "model.onnx"
    keras_das.export(keras.Model([x, offsets, mask], outputs), path, format="onnx")
    assert len(deform_convs(path)) == 1
    found = run(path, **given)
    wanted = oracle.deformable_conv2d(
        values["x"], kernel, values["offsets"], values["mask"], padding="same", offset_groups=2
    )
    assert_close(np.moveaxis(found, 1, 3) if first else found, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "mask"])
def test_bad_values_stay_where_they_are_read(name, bad, operation):
    model, path, values = operation
    values[name][0, 2, 3, 1] = bad
    found, wanted = run(path, **values), model(list(values.values())).numpy()
    finite = np.isfinite(wanted)
    assert not finite.all()
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=1e-4, atol=1e-4)
    if not np.isinf(values["mask"]).any():
        # An infinite mask times a sample is infinite, times a corner that is 0 it is NaN: which of the two
        # comes of it is up to who multiplies with what first.
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


def test_infinite_offsets_read_zero_and_nan_ones_are_lost(operation):
    """The latter is onnxruntime's doing, and `keras_das.export` says so."""
    model, path, values = operation
    values["offsets"][0, 1, 1, 0] = np.inf
    values["offsets"][0, 4, 4, 1] = -np.inf
    wanted = model(list(values.values())).numpy()
    np.testing.assert_allclose(run(path, **values), wanted, rtol=1e-4, atol=1e-4)
    values["offsets"][0, 1, 1, 0] = np.nan
    assert np.isnan(model(list(values.values())).numpy()[0, 1, 1]).all()
    np.testing.assert_allclose(run(path, **values), wanted, rtol=1e-4, atol=1e-4)


def test_nan_pixels_are_seen_through_a_layer(tmp_path, rng):
    """They make the mask NaN as well as the offsets."""
    model = keras.Sequential([keras.Input((9, 8, 3)), keras_das.DeformableConv2D(4, 3, padding="same")])
    path = tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    images = rng.normal(size=(2, 9, 8, 3)).astype("float32")
    images[0, 4, 3, 1] = np.nan
    wanted = model(images).numpy()
    assert 9 <= np.isnan(wanted).sum() < wanted.size / 2
    np.testing.assert_allclose(run_only(path, images), wanted, rtol=1e-4, atol=1e-5)


def test_what_onnx_does_not_have(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(keras.ops.erfinv)])
    with pytest.raises(ValueError, match="`model` holds operations that cannot be written as ONNX: Erfinv"):
        keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "tf2onnx"])
def test_missing_packages(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ImportError, match=rf"needs {package} for this: pip install 'keras-das\[export\]'"):
        keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []
