"""Conversion of a SavedModel to ONNX by tf2onnx, with the model's inputs and outputs."""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_das._requirements import import_extra
from keras_das.exporters import saved_model

_OPSET = 18  # the newest that tf2onnx supports

Handlers = dict[str, tuple[Callable[..., None], list[Any]]]
Specs = dict[str, Any]


def convert(folder: Path, handlers: Handlers, domain: str) -> tuple[Any, Specs, Specs]:
    """Converts the model of a SavedModel that Keras has written.

    Args:
        folder: Path of the SavedModel.
        handlers: Dict of the handlers of operations that tf2onnx does not support; see its
            `custom_op_handlers`.
        domain: String. Domain of the operations that the handlers create.

    Returns:
        The `onnx.ModelProto`, and the `TensorSpec` of each input and each output by name, in Keras' order.

    Raises:
        ValueError: If the model contains operations that ONNX does not have. Errors of tf2onnx are not
            caught.
    """
    # A new thread has no strategy or device scope; variables loaded in such a scope cannot be frozen.
    with _logged() as errors, concurrent.futures.ThreadPoolExecutor(1) as pool:
        converted = pool.submit(_convert, folder, handlers, domain).result()
    _check_operations(converted[0], errors)
    return converted


def check_values(kind: str, values: Any, specs: Specs) -> None:
    """Checks that the inputs or outputs of a graph match the model in number, order, name and dtype.

    Args:
        kind: `"inputs"` or `"outputs"`.
        values: Sequence of those of the graph.
        specs: Dict of those of the model, by name.

    Raises:
        ValueError: If they differ.
    """
    import numpy as np
    import onnx

    def listed(values: list[tuple[str, Any]]) -> str:
        return ", ".join(f"{name!r} ({np.dtype(dtype).name})" for name, dtype in values)

    as_dtype = onnx.helper.tensor_dtype_to_np_dtype
    found = [(value.name, as_dtype(value.type.tensor_type.elem_type)) for value in values]
    wanted = [(name, spec.dtype.as_numpy_dtype) for name, spec in specs.items()]
    if found != wanted:
        raise ValueError(f"the graph has the {kind} {listed(found)}, and the model has {listed(wanted)}.")


def _convert(folder: Path, handlers: Handlers, domain: str) -> tuple[Any, Specs, Specs]:
    import onnx
    import tensorflow as tf

    tf2onnx = import_extra("tf2onnx", "export")
    saved_model.compile_nothing(folder)
    loaded = tf.saved_model.load(str(folder))  # keeps the variables alive during the conversion
    signature = loaded.signatures["serving_default"]
    inputs, outputs = _tensor_names(signature, loaded.serve.concrete_functions[0])
    ends = {"input_names": list(inputs.values()), "output_names": list(outputs.values())}
    # If given a function, tf2onnx converts each captured constant to an input.
    graph = tf2onnx.tf_loader.from_function(signature, *ends.values())
    with tf.device("/cpu:0"), tf.Graph().as_default() as imported:
        tf.import_graph_def(graph, name="")
        converted = tf2onnx.tfonnx.process_tf_graph(
            imported,
            **ends,
            continue_on_error=True,
            tensors_to_rename={tensor: name for name, tensor in (inputs | outputs).items()},
            opset=_OPSET,
            custom_op_handlers={"Erfc": (_convert_erfc, []), **handlers},
            extra_opset=[onnx.helper.make_opsetid(domain, 1)],
        )
    proto = _optimized(converted).make_model("Converted by keras_das")
    input_specs, output_specs = signature.structured_input_signature[1], signature.structured_outputs
    return (
        proto,
        {name: input_specs[saved_model.sanitized(name)] for name in inputs},
        {name: output_specs[name] for name in outputs},
    )


def _optimized(graph: Any) -> Any:
    """Optimizes a graph of tf2onnx, transposes first.

    tf2onnx's optimizer of transposes replaces a transpose with several consumers by one per consumer and may
    then stop, so that the number of transposes depends on the order of sets of strings (tf2onnx 1.17).
    """
    import tf2onnx.optimizer
    from tf2onnx.optimizer.const_fold_optimizer import ConstFoldOptimizer
    from tf2onnx.optimizer.transpose_optimizer import TransposeOptimizer, is_transpose

    class Transposes(TransposeOptimizer):
        def _handle_nhwc_tranpose(self, node: Any) -> bool:
            if super()._handle_nhwc_tranpose(node):
                return True
            if self._g.get_node_by_name(node.name) is not None:
                return False
            branches = filter(is_transpose, self._g.find_output_consumers(node.input[0]))
            return any(super(Transposes, self)._handle_nhwc_tranpose(branch) for branch in branches)

    first = {"transposes": Transposes, "constants": ConstFoldOptimizer}
    graph = tf2onnx.optimizer.optimize_graph(graph, optimizers=first)
    return tf2onnx.optimizer.optimize_graph(graph)


def _check_operations(proto: Any, errors: list[str]) -> None:
    """Checks that ONNX has every operation, because tf2onnx copies operations that it cannot convert."""
    import onnx

    types = {node.op_type for node in proto.graph.node if not node.domain}
    if unknown := sorted(name for name in types if not onnx.defs.has(name)):
        reasons = f" ({errors[0]})" if errors else ""
        raise ValueError(f"it contains operations that ONNX does not support: {', '.join(unknown)}{reasons}.")


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Silences the loggers of tf2onnx and TensorFlow. Yields the list of errors that tf2onnx has logged."""
    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR and record.name.startswith("tf2onnx"):
                cause = record.exc_info[1] if record.exc_info else None
                errors.append(next(iter(str(cause or record.getMessage()).strip().splitlines()), ""))

    loggers = [logging.getLogger(name) for name in ("tf2onnx", "tensorflow")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [Handler()], False
        yield errors
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def _tensor_names(signature: Any, serve: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the tensors of inputs and outputs by name, in the order of the traced function `serve`.

    The signature sorts its inputs and outputs by name.
    """
    keywords, names = signature._arg_keywords, sorted(signature.structured_outputs)
    inputs = {name: tensor.name for name, tensor in zip(keywords, signature.inputs, strict=False)}
    outputs = {name: tensor.name for name, tensor in zip(names, signature.outputs, strict=True)}
    if not isinstance(serve.structured_outputs, Mapping):
        names = [f"output_{number}" for number in range(len(names))]
    return {name: inputs[name] for name in serve._arg_keywords}, {name: outputs[name] for name in names}


def _convert_erfc(graph: Any, node: Any, name: str, arguments: Any, **_: Any) -> None:
    """Handler of tf2onnx, which only supports `Erf`: 1 - erf(x)."""
    import numpy as np

    dtype = graph.get_dtype(node.output[0])
    shape, output = graph.get_shape(node.output[0]), node.output[0]
    erf = graph.make_node("Erf", [node.input[0]], shapes=[shape], dtypes=[dtype])
    numpy_dtype = {1: np.float32, 10: np.float16, 11: np.float64}[dtype]
    one = graph.make_const(f"{node.name}_one", np.array(1, numpy_dtype))
    graph.remove_node(node.name)
    graph.make_node("Sub", [one.output[0], erf.output[0]], outputs=[output], shapes=[shape], dtypes=[dtype])
