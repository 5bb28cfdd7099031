"""ONNX: tf2onnx converts a SavedModel in which deformable convolutions are marked; marks become `DeformConv`.

tf2onnx does not support deformable convolutions or an opset that has them. Each of them is therefore traced
as a placeholder operation (TensorFlow's `PyFuncStateless`) on tensors in ONNX's layout. tf2onnx converts it
to a node of a custom domain, which is renamed after ONNX's version converter has raised the opset.
"""

import tempfile
from pathlib import Path
from typing import Any

import keras

from keras_das._requirements import import_extra
from keras_das.exporters import onnx_conversion, precision
from keras_das.ops.deformable import substituted
from keras_das.ops.geometry import Geometry, Window
from keras_das.ops.pointwise import as_convolutions

Tensor = Any

_OPSET = 19  # the first with DeformConv
_DOMAIN = "keras_das"  # of the marks
_IN_FLOAT32 = ("bfloat16",)  # ONNX has no convolution for it
_LACKING = (*_IN_FLOAT32, "float8_e4m3fn", "float8_e5m2")
_NCHW, _NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def write(model: keras.Model, path: Path, verbose: bool = False) -> None:
    """Writes an ONNX file; see `keras_das.export`."""
    onnx = import_extra("onnx", "export")
    import_extra("tf2onnx", "export")
    marks = _Marks()
    with tempfile.TemporaryDirectory() as scratch:
        with substituted(marks.mark), as_convolutions(), precision.in_float32(model, _IN_FLOAT32):
            model.export(scratch, format="tf_saved_model", verbose=verbose)
        try:
            handlers: onnx_conversion.Handlers = {"PyFuncStateless": (marks.convert, [])}
            proto, inputs, outputs = onnx_conversion.convert(Path(scratch), handlers, _DOMAIN)
            proto = _unmark(onnx, proto)
            onnx.checker.check_model(proto, full_check=True)
            onnx_conversion.check_values("inputs", proto.graph.input, inputs)
            onnx_conversion.check_values("outputs", proto.graph.output, outputs)
        except Exception as error:  # of various classes
            raise ValueError(
                f"`model` cannot be written as ONNX: {_reason(error)}"
                f"{precision.advice(Path(scratch), _LACKING)}"
            ) from error
    onnx.save(proto, str(path))


def _unmark(onnx: Any, proto: Any) -> Any:
    """Raises the opset and converts the marks to `DeformConv`."""
    proto = onnx.version_converter.convert_version(proto, _OPSET)
    for node in proto.graph.node:
        if node.domain == _DOMAIN:
            node.domain = ""
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    return proto


def _reason(error: Exception) -> str:
    """Returns the first line of an error as a sentence, with its class unless it is a ValueError."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}."


class _Marks:
    """The deformable convolutions of a graph during tracing, and their placeholder nodes."""

    def __init__(self) -> None:
        self.attributes: dict[str, dict[str, Any]] = {}

    def mark(
        self,
        inputs: Tensor,
        kernel: Tensor,
        offsets: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
        dtype: str,
    ) -> Tensor:
        """Traces one operation with the tensors of a `DeformConv` and stores its attributes."""
        import tensorflow as tf

        working = "float64" if dtype == "float64" else "float32"
        x, kernel, offsets = (tf.cast(t, working) for t in (inputs, kernel, offsets))
        sides = [_padding(w, size) for w, size in zip(_windows(geometry), _sizes(inputs), strict=True)]
        if not all(isinstance(pad, int) for side in sides for pad in side):
            # Strided "same" padding depends on the size, so the input is padded in advance.
            x, sides = tf.pad(x, ((0, 0), *sides, (0, 0))), [(0, 0), (0, 0)]
        filters = kernel.shape[3]
        tensors = [
            tf.transpose(x, _NCHW),
            tf.transpose(kernel, (3, 2, 0, 1)),
            tf.transpose(offsets, _NCHW),
            tf.zeros((filters,), working) if bias is None else tf.cast(bias, working),
        ]
        if mask is not None:
            tensors.append(tf.transpose(tf.cast(mask, working), _NCHW))
        output = tf.numpy_function(_never_run, tensors, working, stateful=False)
        self.attributes[output.op.get_attr("token").decode()] = _attributes(geometry, sides)
        output = tf.ensure_shape(output, (inputs.shape[0], filters, None, None))
        return tf.cast(tf.transpose(output, _NHWC), dtype)

    def convert(self, graph: Any, node: Any, name: str, arguments: Any, **_: Any) -> None:
        """Handler of tf2onnx: converts the operation to a node of the custom domain."""
        attributes = self.attributes[node.get_attr_str("token")]
        for attribute in list(node.attr):
            del node.attr[attribute]
        node.type, node.domain = "DeformConv", _DOMAIN
        for attribute, value in attributes.items():
            node.set_attr(attribute, value)
        filters = graph.get_shape(node.input[1])[0]
        graph.set_shape(node.output[0], [-1, filters, -1, -1])
        graph.set_dtype(node.output[0], graph.get_dtype(node.input[0]))


def _never_run(*tensors: Any) -> Any:
    raise RuntimeError("This graph is a placeholder for an ONNX graph and cannot be run.")


def _attributes(geometry: Geometry, sides: list[tuple[int, int]]) -> dict[str, Any]:
    windows = _windows(geometry)
    (top, bottom), (left, right) = sides
    return {
        "kernel_shape": [window.kernel for window in windows],
        "strides": [window.stride for window in windows],
        "dilations": [window.dilation for window in windows],
        "pads": [top, left, bottom, right],
        "group": geometry.groups,
        "offset_group": geometry.offset_groups,
    }


def _windows(geometry: Geometry) -> tuple[Window, Window]:
    return geometry.rows, geometry.columns


def _sizes(inputs: Tensor) -> list[Any]:
    """Returns rows and columns, as integers if they are known, otherwise as scalar tensors."""
    return list(keras.ops.shape(inputs)[1:3])


def _padding(window: Window, size: Any) -> tuple[Any, Any]:
    """Returns the number of zeros before and after."""
    if window.padding != "same":
        return window.padding[0], window.padding[1]
    before = window.pad_before(size)
    if window.stride == 1:
        return before, window.extent - 1 - before
    needed = (window.output_size(size) - 1) * window.stride + window.extent - size
    total = max(needed, 0) if isinstance(needed, int) else keras.ops.maximum(needed, 0)
    return before, total - before
