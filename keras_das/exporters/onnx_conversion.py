"""From a SavedModel to ONNX, by tf2onnx: the inputs and outputs are the model's, and all else is constant."""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_das._requirements import import_extra
from keras_das.exporters import saved_model

_OPSET = 18  # the last that tf2onnx writes

Handlers = dict[str, tuple[Callable[..., None], list[Any]]]
Specs = dict[str, Any]


def convert(folder: Path, handlers: Handlers, domain: str) -> tuple[Any, Specs, Specs]:
    """Converts the model of a SavedModel that Keras has written.

    Args:
        folder: The SavedModel.
        handlers: What tf2onnx does with operations that it does not know; see its `custom_op_handlers`.
        domain: Of the operations that the handlers make.

    Returns:
        The `onnx.ModelProto`, and a `TensorSpec` by name of each input and of each output, in Keras' order.

    Raises:
        ValueError: If there are operations that ONNX does not have. What tf2onnx raises besides is raised.
    """
    # The scopes of strategies and devices are a thread's own. Variables loaded in them could not be frozen.
    with _logged() as errors, concurrent.futures.ThreadPoolExecutor(1) as pool:
        converted = pool.submit(_convert, folder, handlers, domain).result()
    _check_operations(converted[0], errors)
    return converted


def check_values(kind: str, values: Any, specs: Specs) -> None:
    """Checks that a graph's inputs or outputs are the model's, in number, order, name and dtype.

    Args:
        kind: `"inputs"` or `"outputs"`.
        values: Of the graph.
        specs: Of the model.

    Raises:
        ValueError: If they are not.
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
    loaded = tf.saved_model.load(str(folder))  # held, for its variables must outlive the conversion
    signature = loaded.signatures["serving_default"]
    inputs, outputs = _tensor_names(signature, loaded.serve.concrete_functions[0])
    ends = {"input_names": list(inputs.values()), "output_names": list(outputs.values())}
    # Given a function, tf2onnx would make an input of each constant that the function captures.
    graph = tf2onnx.tf_loader.from_function(signature, *ends.values())
    proto, _ = tf2onnx.convert.from_graph_def(
        graph,
        **ends,
        tensors_to_rename={tensor: name for name, tensor in (inputs | outputs).items()},
        opset=_OPSET,
        custom_op_handlers={"Erfc": (_convert_erfc, []), **handlers},
        extra_opset=[onnx.helper.make_opsetid(domain, 1)],
    )
    input_specs, output_specs = signature.structured_input_signature[1], signature.structured_outputs
    return (
        proto,
        {name: input_specs[name] for name in inputs},
        {name: output_specs[name] for name in outputs},
    )


def _check_operations(proto: Any, errors: list[str]) -> None:
    """Checks that ONNX has every operation: tf2onnx leaves those that it cannot convert as they are."""
    import onnx

    types = {node.op_type for node in proto.graph.node if not node.domain}
    if unknown := sorted(name for name in types if not onnx.defs.has(name)):
        reasons = f" ({errors[0]})" if errors else ""
        raise ValueError(f"it holds operations that ONNX does not have: {', '.join(unknown)}{reasons}.")


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Keeps the loggers of tf2onnx and TensorFlow silent. Gives the list that tf2onnx adds errors to."""
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
    """The graph's tensors by the names of inputs and of outputs, in the order of the traced function `serve`.

    A signature has its inputs and outputs sorted by name.
    """
    keywords, names = signature._arg_keywords, sorted(signature.structured_outputs)
    inputs = {name: tensor.name for name, tensor in zip(keywords, signature.inputs, strict=False)}
    outputs = {name: tensor.name for name, tensor in zip(names, signature.outputs, strict=True)}
    if not isinstance(serve.structured_outputs, Mapping):
        names = [f"output_{number}" for number in range(len(names))]
    return {name: inputs[name] for name in serve._arg_keywords}, {name: outputs[name] for name in names}


def _convert_erfc(graph: Any, node: Any, name: str, arguments: Any, **_: Any) -> None:
    """Of tf2onnx, which knows `Erf` alone: 1 - erf(x)."""
    import numpy as np

    dtype = graph.get_dtype(node.output[0])
    shape, output = graph.get_shape(node.output[0]), node.output[0]
    erf = graph.make_node("Erf", [node.input[0]], shapes=[shape], dtypes=[dtype])
    numpy_dtype = {1: np.float32, 10: np.float16, 11: np.float64}[dtype]
    one = graph.make_const(f"{node.name}_one", np.array(1, numpy_dtype))
    graph.remove_node(node.name)
    graph.make_node("Sub", [one.output[0], erf.output[0]], outputs=[output], shapes=[shape], dtypes=[dtype])
