"""Runs the op with TensorFlow: eagerly, in a graph, and compiled by XLA."""

from __future__ import annotations

import functools

import pytest
import tensorflow as tf

from keras_das import ops
from keras_das.kernels import targets
from tests.ops.op_cases import call, from_layout, split_upstream, to_layout

MODES = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": functools.partial(tf.function, jit_compile=True),
}
needs_xla_kernels = pytest.mark.skipif(bool(targets.xla_problem()), reason=targets.xla_problem())


def tensors_of(arrays, data_format="channels_last"):
    return {name: tf.constant(to_layout(name, array, data_format)) for name, array in arrays.items()}


def value_and_gradients(arguments, upstream, **call_options):
    """Returns the outputs and the gradients of sum(upstream * outputs) by argument."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        outputs = call(arguments, **call_options)
    return outputs, tape.gradient(outputs, arguments, upstream)


def runner(case, mode="eager", data_format="channels_last", implementation="reference"):
    """Returns a function that maps channels-last arrays to channels-last outputs and gradients.

    It is compiled at most once.
    """
    compute = MODES[mode](
        functools.partial(
            value_and_gradients, case=case, data_format=data_format, implementation=implementation
        )
    )

    def run_once(arrays):
        outputs, gradients = compute(*split_upstream(tensors_of(arrays, data_format)))
        missing = [name for name, gradient in gradients.items() if gradient is None]
        assert not missing, f"no gradient for {missing}"
        back = {name: from_layout(name, gradient, data_format) for name, gradient in gradients.items()}
        return from_layout("outputs", outputs, data_format), back

    return run_once


def run(case, arrays, *how, **options):
    """Creates a `runner` and calls it once."""
    return runner(case, *how, **options)(arrays)


def kernels_value_and_gradients(arguments, upstream, threads=None, mode="eager", **options):
    """Runs the kernels of TensorFlow's op, for `random_cases.check`.

    The number of threads is TensorFlow's.
    """

    def compute(tensors, upstream):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = ops.deformable_conv2d(**tensors, **options, implementation="native")
        return outputs, tape.gradient(outputs, tensors, upstream)

    tensors = tensors_of({**arguments, "outputs": upstream})
    upstream = tensors.pop("outputs")
    outputs, gradients = MODES[mode](compute)(tensors, upstream)
    return outputs.numpy(), {name: gradient.numpy() for name, gradient in gradients.items()}
