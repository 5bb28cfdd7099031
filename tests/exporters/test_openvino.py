"""OpenVINO: one `DeformableConvolution` for each, and its numbers are Keras'."""

import sys

import keras
import openvino
import pytest

import keras_das
from tests.exporters.conftest import assert_close, many_convolutions


def compiled(folder):
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would take bfloat16
    return openvino.compile_model(str(folder / "model.xml"), "CPU", options)


def deformable_convolutions(folder):
    operations = openvino.Core().read_model(str(folder / "model.xml")).get_ops()
    return [of for of in operations if of.get_type_name() == "DeformableConvolution"]


@pytest.mark.slow
def test_resnet18_with_four_gates(resnet18, expected, tmp_path):
    folder = tmp_path / "model"
    keras_das.export(resnet18, folder, format="openvino")
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", "model.xml"]
    assert len(deformable_convolutions(folder)) == 4
    network = compiled(folder)
    for images, outputs in expected:
        assert_close(network({"image": images})["output_0"], outputs)


def test_every_kind_of_convolution(tmp_path, rng):
    model, count = many_convolutions()
    keras_das.export(model, tmp_path / "model", format="openvino")
    assert len(deformable_convolutions(tmp_path / "model")) == count
    network = compiled(tmp_path / "model")
    for shape in [(2, 32, 32, 3), (1, 37, 45, 3)]:
        images = rng.normal(size=shape).astype("float32")
        assert_close(network({"image": images})["output_0"], model(images).numpy())


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ImportError, match=r"needs openvino for this: pip install 'keras-das\[export\]'"):
        keras_das.export(model, tmp_path / "model", format="openvino")
    assert list(tmp_path.iterdir()) == []
