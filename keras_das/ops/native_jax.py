"""The kernels as XLA FFI calls of JAX, and their gradients. Imported when the kernels are first used."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from keras_das.kernels import library
from keras_das.ops import reference
from keras_das.ops.kernel_attributes import Attributes, make_geometry

Tensor = Any

_FORWARD, _BACKWARD = "keras_das_deformable_conv2d", "keras_das_deformable_conv2d_grad"
_DETERMINISTIC = {"--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true"}  # in XLA_FLAGS


def _register() -> None:
    handlers = library.jax_library()
    platforms = {"cpu": (handlers.KerasDasDeformableConv2D, handlers.KerasDasDeformableConv2DGrad)}
    if library.cuda_architectures("jax"):
        platforms["CUDA"] = (
            handlers.KerasDasDeformableConv2DCuda,
            handlers.KerasDasDeformableConv2DGradCuda,
        )
    for platform, (forward, backward) in platforms.items():
        jax.ffi.register_ffi_target(_FORWARD, jax.ffi.pycapsule(forward), platform=platform)
        jax.ffi.register_ffi_target(_BACKWARD, jax.ffi.pycapsule(backward), platform=platform)


_register()  # runs once, because the import of a module is locked


def deformable_conv2d(
    inputs: Tensor, others: tuple[Tensor | None, ...], attributes: Attributes, dtype: str, sums: str
) -> Tensor:
    """Calls the handler, with the arguments and the result of `native_tensorflow.deformable_conv2d`."""
    given = [jnp.zeros((0,), sums) if other is None else jnp.asarray(other, sums) for other in others]
    return _convolve(attributes, jnp.asarray(inputs, dtype), _rounded(given[0], dtype), *given[1:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(tensor: Tensor, dtype: Any) -> Tensor:
    """The tensor with the precision of `dtype`, if that has 16 bits.

    The kernels rely on it, and XLA may remove conversions to 16 bits and back.
    """
    limits = jnp.finfo(dtype)
    if limits.bits > 16:
        return tensor
    rounded = jax.lax.reduce_precision(tensor, limits.nexp, limits.nmant)
    if limits.nexp == jnp.finfo(tensor.dtype).nexp:
        return rounded
    # Subnormal numbers of float16, which `reduce_precision` replaces by 0.
    multiples = jax.lax.round(tensor * 2.0**24, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(jnp.abs(tensor) < limits.smallest_normal, multiples * 2.0**-24, rounded)


@_rounded.defjvp
def _rounded_jvp(dtype: Any, primals: tuple[Tensor], tangents: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """Passes gradients on as they are."""
    return _rounded(*primals, dtype), *tangents


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(attributes: Attributes, *tensors: Tensor) -> Tensor:
    inputs, kernel, *_ = tensors
    rows, columns = make_geometry(attributes, inputs.shape[-1], kernel.shape)[:2]
    out = (rows.output_size(inputs.shape[1]), columns.output_size(inputs.shape[2]))
    shape = (inputs.shape[0], *out, kernel.shape[-1])
    return _call(_FORWARD, jax.ShapeDtypeStruct(shape, inputs.dtype), attributes, tensors)


def _convolve_forward(attributes: Attributes, *tensors: Tensor) -> tuple[Tensor, Any]:
    return _convolve(attributes, *tensors), tensors[:4]


def _convolve_backward(attributes: Attributes, saved: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
    inputs, kernel, *_ = saved
    upstream = _rounded(grad_output.astype(kernel.dtype), inputs.dtype)
    gradients = _gradients(attributes, *saved, upstream)
    return gradients[0].astype(inputs.dtype), *gradients[1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(attributes: Attributes, *tensors: Tensor) -> Sequence[Tensor]:
    _, kernel, *_ = tensors
    bias_shape = kernel.shape[-1:] if attributes.has_bias else (0,)
    shapes = [*(tensor.shape for tensor in tensors[:4]), bias_shape]
    results = [jax.ShapeDtypeStruct(shape, kernel.dtype) for shape in shapes]
    return _call(_BACKWARD, results, attributes, tensors)


def _gradients_forward(attributes: Attributes, *tensors: Tensor) -> tuple[Sequence[Tensor], Any]:
    return _gradients(attributes, *tensors), tensors


def _gradients_backward(attributes: Attributes, saved: Any, upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Uses the reference, which can be differentiated any number of times."""
    _, pull_back = jax.vjp(functools.partial(_reference_gradients, attributes), *saved)
    return pull_back(list(upstream))


def _reference_gradients(attributes: Attributes, *tensors: Tensor) -> list[Tensor]:
    *given, grad_output = tensors
    inputs, kernel, *_ = given
    geometry = make_geometry(attributes, inputs.shape[-1], kernel.shape)

    def convolve(inputs: Tensor, kernel: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        mask = mask if attributes.has_mask else None
        return reference.deformable_conv2d(inputs, kernel, offsets, mask, None, geometry, kernel.dtype.name)

    _, pull_back = jax.vjp(convolve, inputs.astype(kernel.dtype), *given[1:])
    bias = grad_output.sum((0, 1, 2)) if attributes.has_bias else jnp.zeros((0,), kernel.dtype)
    return [*pull_back(grad_output), bias]


_convolve.defvjp(_convolve_forward, _convolve_backward)
_gradients.defvjp(_gradients_forward, _gradients_backward)


def _call(target: str, results: Any, attributes: Attributes, tensors: Sequence[Tensor]) -> Any:
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    # The handlers expect 64-bit integers, independently of the precision that JAX is configured with.
    arrays = {
        name: np.array(value, np.int64) if isinstance(value, tuple) else value
        for name, value in attributes._asdict().items()
    }
    arrays["offset_groups"] = np.int64(attributes.offset_groups)
    arrays["deterministic"] = not _DETERMINISTIC.isdisjoint(os.environ.get("XLA_FLAGS", "").split())
    return call(*tensors, **arrays)
