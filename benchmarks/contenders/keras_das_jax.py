"""`keras_das.ops.deformable_conv2d` on JAX, compiled."""

import functools
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras_das
import numpy as np

VERSIONS = ("keras-das", "keras", "jax")
ARGUMENTS = ("inputs", "kernel", "offsets", "mask")


def prepare(problem, mode, threads, implementation):
    jax.config.update("jax_default_matmul_precision", "highest")  # on GPUs: float32 is what is compared
    tensors = {name: jax.numpy.asarray(array) for name, array in problem.arrays.items()}
    convolve = functools.partial(
        keras_das.ops.deformable_conv2d, padding="same", implementation=implementation
    )

    def forward(upstream, arguments):
        return [convolve(**arguments)]

    def forward_backward(upstream, arguments):
        fixed = {name: arguments.pop(name) for name in set(ARGUMENTS) - set(problem.differentiated)}
        output, pull_back = jax.vjp(lambda varied: convolve(**varied, **fixed), arguments)
        (gradients,) = pull_back(upstream)
        return [output, *(gradients[name] for name in problem.differentiated)]

    compiled = jax.jit(forward if mode == "forward" else forward_backward)
    arguments = {name: tensors[name] for name in ARGUMENTS}
    run = functools.partial(compiled, tensors["grad_output"], arguments)
    return run, lambda results: [np.asarray(result) for result in results]


def copy(elements):
    """A function that copies a tensor of that many float32 numbers."""
    return functools.partial(jax.numpy.array, jax.numpy.zeros(elements), copy=True)
