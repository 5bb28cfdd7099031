"""OpenVINO: OpenVINO's converter maps `DeformConv` of the ONNX model to `DeformableConvolution`."""

import tempfile
from pathlib import Path
from typing import Any

import keras

from keras_das._requirements import import_extra
from keras_das.exporters import onnx


def write(model: keras.Model, folder: Path, verbose: bool = False) -> None:
    """Writes `model.xml` and `model.bin` to a new folder; see `keras_das.export`."""
    openvino = import_extra("openvino", "export")
    frontend = import_extra("openvino.frontend", "export")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.write(model, path, verbose)
        extension = frontend.ConversionExtension("DeformConv", _deformable_convolution)
        converted = openvino.convert_model(str(path), extension=[extension], verbose=verbose)
        folder.mkdir()
        openvino.save_model(converted, str(folder / "model.xml"), compress_to_fp16=False)


def _deformable_convolution(node: Any) -> list[Any]:
    import openvino.opset8 as opset

    inputs = [node.get_input(i) for i in range(node.get_input_size())]
    x, kernel, offsets, bias, *mask = inputs
    top, left, bottom, right = node.get_attribute("pads")
    output = opset.deformable_convolution(
        x,
        offsets,
        kernel,
        list(node.get_attribute("strides")),
        [top, left],
        [bottom, right],
        list(node.get_attribute("dilations")),
        *mask,
        group=node.get_attribute("group"),
        deformable_group=node.get_attribute("offset_group"),
        bilinear_interpolation_pad=True,  # corners outside the image count as 0
    )
    by_channel = opset.reshape(bias, opset.constant([1, -1, 1, 1]), special_zero=False)
    return opset.add(output, by_channel).outputs()
