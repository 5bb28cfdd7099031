"""OpenVINO: OpenVINO's converter maps `DeformConv` of the ONNX model to `DeformableConvolution`."""

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_das._requirements import import_extra
from keras_das.exporters import onnx

# OpenVINO 2026.4 has vector code for one group whose channels are a multiple of the vector length, and scalar
# code otherwise. Up to this many channels, a depthwise convolution is faster as one group, whose kernel has
# zeros between different channels.
_ONE_GROUP_CHANNELS = 64
_VECTOR = 16


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
    groups, offset_groups = node.get_attribute("group"), node.get_attribute("offset_group")
    filters = kernel.get_partial_shape()[0].get_length()
    one_group = groups == filters and 1 < filters <= _ONE_GROUP_CHANNELS and offset_groups == 1
    if one_group:
        x, kernel, groups = _pad_channels(x, filters), _one_group_kernel(kernel, filters), 1
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
        group=groups,
        deformable_group=offset_groups,
        bilinear_interpolation_pad=True,  # corners outside the image count as 0
    )
    if one_group:
        output = opset.slice(output, *(opset.constant([value]) for value in (0, filters, 1, 1)))
    by_channel = opset.reshape(bias, opset.constant([1, -1, 1, 1]), special_zero=False)
    return opset.add(output, by_channel).outputs()


def _one_group_kernel(kernel: Any, channels: int) -> Any:
    """Returns the kernel of one group that is equal to a depthwise kernel `(channels, 1, kh, kw)`."""
    import openvino.opset8 as opset

    diagonal = opset.constant(np.eye(channels, dtype=kernel.get_element_type().to_dtype())[:, :, None, None])
    return _pad_channels(opset.multiply(kernel, diagonal), channels, axes=(0, 1))


def _pad_channels(x: Any, channels: int, axes: tuple[int, ...] = (1,)) -> Any:
    """Appends channels of zeros to these axes, up to a multiple of the vector's length."""
    import openvino.opset8 as opset

    ends = [-channels % _VECTOR if axis in axes else 0 for axis in range(4)]
    return opset.pad(x, opset.constant([0] * 4), opset.constant(ends), "constant")
