"""Runs contenders written in TensorFlow: eagerly, in a graph, or compiled by XLA."""

import functools

import tensorflow as tf

ARGUMENTS = ("inputs", "kernel", "offsets", "mask")
COMPILE = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": functools.partial(tf.function, jit_compile=True),
}


def prepare(problem, mode, how, convolve):
    """`run` and `collect` for `convolve(inputs, kernel, offsets, mask)`."""
    tf.config.experimental.enable_tensor_float_32_execution(False)  # on GPUs: compares float32
    tensors = {name: tf.constant(array) for name, array in problem.arrays.items()}
    upstream = tensors["grad_output"]
    arguments = [tensors[name] for name in ARGUMENTS]

    def forward(*arguments):
        return [convolve(*arguments)]

    def forward_backward(upstream, *arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = convolve(*arguments)
        sources = [arguments[ARGUMENTS.index(name)] for name in problem.differentiated]
        # Without the output, TensorFlow prunes most of the forward pass, as the operation is linear in its
        # input.
        return [output, *tape.gradient(output, sources, upstream)]

    if mode == "forward":
        run = functools.partial(COMPILE[how](forward), *arguments)
    else:
        run = functools.partial(COMPILE[how](forward_backward), upstream, *arguments)
    return run, lambda results: [result.numpy() for result in results]
