"""The fused kernels: the check whether they support a call, and the call itself.

The framework-specific modules, `native_tensorflow.py` and `native_jax.py`, are imported when the kernels are
first used, and so is the kernel library.
"""

import contextlib
import contextvars
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_das._keras_internals import EXPORT_MODULES
from keras_das.kernels import library, targets
from keras_das.ops.geometry import Geometry
from keras_das.ops.kernel_attributes import make_attributes

Tensor = Any

CONTEXTS = ("eager", "graph", "XLA")
# Modules that trace a model or a function in order to write it.
_EXPORTERS = (EXPORT_MODULES, "tensorflow.python.saved_model.", "tensorflow.lite.python.", "tf2onnx.")
_UNDECIDED = "CPU or GPU"  # the kind of device if the graph does not specify it
_portable = contextvars.ContextVar("keras_das_portable", default=False)


def can_use(
    context: str | None = None,
    tensors: Sequence[Tensor | None] = (),
    raise_error: bool = False,
) -> bool:
    """Whether the fused kernels support a call.

    Args:
        context: String. See `why_not`. Defaults to `None`.
        tensors: Sequence of tensors. See `why_not`. Defaults to `()`.
        raise_error: Boolean. Whether to raise an error instead of returning `False`. Defaults to `False`.

    Returns:
        `True` or `False`.

    Raises:
        RuntimeError: If `raise_error` is set and the kernels do not support the call. The message says why.
    """
    reason = why_not(context, tensors)
    if reason and raise_error:
        raise RuntimeError(f'implementation="native" cannot be used: {reason}. Use "auto" or "reference".')
    return not reason


def why_not(context: str | None = None, tensors: Sequence[Tensor | None] = ()) -> str:
    """Returns the reason why the fused kernels do not support a call.

    Without tensors, the answer applies to calls from this place in the program, with the current Keras
    backend, on the device that they would use. `context` can differ from the context of the caller.

    Args:
        context: String. How the call runs: `"eager"`, `"graph"` (a `tf.function`) or `"XLA"`
            (`jit_compile=True`, and always on JAX). Defaults to `None`, which selects the context of the
            caller.
        tensors: Sequence of the tensors of the call, if known. `None` elements are ignored. Defaults to `()`.

    Returns:
        The reason, or "" if the kernels support the call. The kernel library is loaded if there is no other
        reason.

    Raises:
        ValueError: If `context` is invalid.
    """
    if context is not None and context not in CONTEXTS:
        raise ValueError(f"`context` must be one of {CONTEXTS} or None. Received: context={context!r}")
    backend = keras.backend.backend()
    if backend not in _PLACES:
        return f"there are no kernels for Keras' {backend} backend"
    if reason := _why_not_in_xla(backend, context):
        return reason
    places = _PLACES[backend](context, [tensor for tensor in tensors if tensor is not None])
    others = {kind: where for kind, where in places.items() if kind != "CPU"}
    for kind, where in others.items():
        if kind not in ("GPU", _UNDECIDED):
            return f"the kernels run on CPUs and NVIDIA GPUs only, and {where}"
    if reason := library.why_not(backend):
        return reason
    return _why_not_cuda(backend, next(iter(others.values()))) if others else ""


def deformable_conv2d(
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    dtype: str,
) -> Tensor:
    """Computes the convolution with the kernels, for calls that `can_use` accepts.

    Arguments and result are those of `reference.deformable_conv2d`.
    """
    call: Callable[..., Tensor]
    if keras.backend.backend() == "jax":
        from keras_das.ops import native_jax

        call = native_jax.deformable_conv2d
    else:
        from keras_das.ops import native_tensorflow

        call = native_tensorflow.deformable_conv2d
    attributes = make_attributes(geometry, mask is not None, bias is not None)
    # All tensors except the inputs have the dtype of the sums.
    sums = "float64" if dtype == "float64" else "float32"
    return call(inputs, (kernel, offsets, mask, bias), attributes, dtype, sums)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Context manager for tracing graphs without the fused kernels, so that they run without this package.

    Use it for functions that you trace yourself and then freeze, convert or save. Functions that were traced
    earlier keep the kernels. `keras_das.export`, `model.export`, `tf.saved_model.save`, TensorFlow's LiteRT
    converter and tf2onnx do not need it for a model, or for a `tf.function` that has not been called.

    The context applies to the current thread only.

    Example:

    >>> with keras_das.portable():
    ...     traced = tf.function(model).get_concrete_function(tf.TensorSpec((1, 32, 32, 3)))
    >>> tf.lite.TFLiteConverter.from_concrete_functions([traced]).convert()
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def load_ops() -> None:
    """Registers the fused kernels with TensorFlow, which is required to load graphs that contain them.

    Call it before `tf.saved_model.load` if loading fails with "Op type not registered
    'KerasDas>DeformableConv2D'". Repeated calls have no effect.

    Raises:
        RuntimeError: If there is no kernel library for this version of TensorFlow. The message says why.

    Example:

    >>> keras_das.load_ops()
    >>> tf.saved_model.load("saved/1")
    """
    library.tensorflow_ops()
    from keras_das.ops import native_tensorflow  # noqa: F401, which registers the gradients


def must_be_portable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the current graph is traced for an export and must run without the kernel library.

    Keras, TensorFlow and tf2onnx have no hook for this, so exports are detected on the call stack.
    """
    if _portable.get():
        return True
    if not _is_tracing(tensors):
        return False
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_EXPORTERS):
            return True
        frame = frame.f_back
    return False


def xla_compiles_for_cpu() -> bool:
    """Whether operations called here become part of a program that XLA compiles for a CPU."""
    if keras.backend.backend() == "tensorflow" and not tensorflow_in_xla():
        return False
    places = _PLACES.get(keras.backend.backend())
    return places is not None and set(places("XLA", ())) <= {"CPU"}


def tensorflow_in_xla() -> bool:
    """Whether operations of TensorFlow called here become part of an XLA program."""
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    try:  # no public function reports `jit_compile`
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:
        return False
    return bool(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def _is_tracing(tensors: Sequence[Tensor | None]) -> bool:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    if keras.backend.backend() == "jax":
        import jax

        return any(isinstance(tensor, jax.core.Tracer) for tensor in tensors)
    return False


def _why_not_cuda(framework: str, where: str) -> str:
    """Why a loaded library cannot run on a GPU, or "". `where` describes the GPU for the message."""
    if not library.cuda_architectures(framework):
        return (
            f"the kernels run on the CPU only, and {where}; "
            '"keras-das build --cuda" adds kernels for NVIDIA GPUs'
        )
    if problem := library.cuda_problem(framework):
        built = library.cuda_architectures(framework)
        return f"the CUDA kernels, built for {built}, cannot run on this GPU ({problem})"
    return ""


def _why_not_in_xla(framework: str, context: str | None) -> str:
    """Why the kernels cannot run because XLA compiles the call, or ""."""
    if framework != "tensorflow":
        return ""
    problem = targets.xla_problem()
    in_xla = context == "XLA" or (context is None and tensorflow_in_xla())
    return problem if in_xla else ""


def _tensorflow_places(context: str | None, tensors: Sequence[Tensor]) -> dict[str, str]:
    """The kinds of devices that a call runs on, with a description of each for messages."""
    import tensorflow as tf

    if tensors and context in (None, "eager") and tf.executing_eagerly():
        devices = {tensor.device for tensor in tensors}
    elif all(device.device_type == "CPU" for device in tf.config.list_logical_devices()):
        return {"CPU": ""}
    else:
        devices = {tf.constant(0.0).device}  # the default device at this place in the program
    return dict(map(_tensorflow_place, sorted(devices)))


@functools.cache
def _tensorflow_place(device: str) -> tuple[str, str]:
    import tensorflow as tf

    kind = tf.DeviceSpec.from_string(device).device_type
    if kind is None:
        return _UNDECIDED, "there is a GPU, and no device scope asks for the CPU"
    return kind, f"this would run on {device}"


def _jax_places(context: str | None, tensors: Sequence[Tensor]) -> dict[str, str]:
    import jax

    platforms = {jax.default_backend()}
    for tensor in tensors:
        if isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer):
            platforms |= {device.platform for device in tensor.devices()}
    return {platform.upper(): f"this would run on {platform}" for platform in sorted(platforms)}


_PLACES: dict[str, Callable[[str | None, Sequence[Tensor]], dict[str, str]]] = {
    "tensorflow": _tensorflow_places,
    "jax": _jax_places,
}
