"""The kernels as TensorFlow ops, and their gradients. Imported when the kernels are first used."""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_das.kernels import library
from keras_das.ops import reference
from keras_das.ops.kernel_attributes import Attributes, make_geometry

Tensor = Any

_EMPTY = {dtype: np.zeros(0, dtype) for dtype in ("float32", "float64")}  # for tensors that are `None`


def deformable_conv2d(
    inputs: Tensor, others: tuple[Tensor | None, ...], attributes: Attributes, dtype: str, sums: str
) -> Tensor:
    """Calls the op, for `native.deformable_conv2d`.

    Args:
        inputs: Tensor. The feature map.
        others: Tuple of kernel, offsets, mask and bias. The last two can be `None`.
        attributes: `Attributes` of the op.
        dtype: String. Dtype of the result.
        sums: String. Dtype of the sums.

    Returns:
        The output.
    """
    given = [_EMPTY[sums] if other is None else _cast(other, sums) for other in others]
    ops = library.tensorflow_ops()
    return ops.keras_das_deformable_conv2d(_cast(inputs, dtype), *given, **attributes._asdict())


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    """`tf.cast`, which takes as long as a small convolution even if there is nothing to do."""
    return tensor if tensor.dtype.name == dtype else tf.cast(tensor, dtype)


@tf.RegisterGradient("KerasDas>DeformableConv2D")
def _gradient(op: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
    inputs, kernel, offsets, mask, _ = op.inputs
    gradients = library.tensorflow_ops().keras_das_deformable_conv2d_grad(
        inputs, kernel, offsets, mask, tf.cast(grad_output, kernel.dtype), **_attributes(op)._asdict()
    )
    return tf.cast(gradients[0], inputs.dtype), *gradients[1:]


@tf.RegisterGradient("KerasDas>DeformableConv2DGrad")
def _second_gradient(op: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
    """Uses the reference, which can be differentiated any number of times."""
    attributes = _attributes(op)
    sums = op.inputs[1].dtype
    given = [tf.cast(tensor, sums) for tensor in op.inputs]
    with tf.GradientTape() as outer:
        outer.watch(given)
        inputs, kernel, offsets, mask, grad_output = given
        with tf.GradientTape() as inner:
            inner.watch(given)
            output = reference.deformable_conv2d(
                inputs,
                kernel,
                offsets,
                mask if attributes.has_mask else None,
                None,
                make_geometry(attributes, inputs.shape[-1], tuple(kernel.shape)),
                sums.name,
            )
        gradients = inner.gradient(output, given[:4], grad_output, unconnected_gradients="zero")
        if attributes.has_bias:
            gradients.append(tf.reduce_sum(grad_output, axis=(0, 1, 2)))
    seconds = outer.gradient(gradients, given, list(upstream[: len(gradients)]), unconnected_gradients="zero")
    return tf.cast(seconds[0], op.inputs[0].dtype), *seconds[1:]


def _attributes(op: Any) -> Attributes:
    values = [op.get_attr(name) for name in Attributes._fields]
    plain = (tf.compat.as_str(value) if isinstance(value, bytes) else value for value in values)
    return Attributes._make(tuple(value) if isinstance(value, list) else value for value in plain)
