"""How the contenders written in TensorFlow run: eagerly, in a graph, compiled by XLA, once or many times."""

import functools

import numpy as np
import tensorflow as tf

ARGUMENTS = ("inputs", "kernel", "offsets", "mask")
COMPILE = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": functools.partial(tf.function, jit_compile=True),
}


def prepare(problem, mode, how, convolve, calls=1):
    """`run` and `collect` for `convolve(inputs, kernel, offsets, mask)`, which a run does that many times."""
    tf.config.experimental.enable_tensor_float_32_execution(False)  # on GPUs: float32 is what is compared
    tensors = {name: tf.constant(array) for name, array in problem.arrays.items()}
    upstream = tensors["grad_output"]
    arguments = [tensors[name] for name in ARGUMENTS]

    def forward(*arguments):
        return [convolve(*arguments)]

    def forward_backward(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = convolve(*arguments)
        sources = [arguments[ARGUMENTS.index(name)] for name in problem.differentiated]
        # Without the output, TensorFlow prunes most of the forward pass, as the operation is linear in its
        # input.
        return [output, *tape.gradient(output, sources, upstream)]

    function = forward if mode == "forward" else forward_backward
    run = functools.partial(COMPILE[how](_repeat(function, calls)), *arguments)
    return run, lambda results: [result.numpy() for result in results]


def _repeat(function, calls):
    """A function that computes `calls` times, one after another: what starting a program takes is shared."""

    if calls == 1:
        return function

    def repeated(inputs, kernel, offsets, mask):
        # Too small to change the kernel, which the compiler cannot know: no result can be used again.
        least = np.finfo(kernel.dtype.as_numpy_dtype).smallest_subnormal

        def step(number, kernel, *_):
            results = function(inputs, kernel, offsets, mask)
            return number + 1, kernel + results[0][0, 0, 0] * least, *results

        first = step(tf.constant(0), kernel)
        return list(tf.while_loop(lambda number, *_: number < calls, step, first)[2:])

    return repeated


def copy(elements):
    """A function that copies a tensor of that many float32 numbers."""
    tensor = tf.zeros((elements,))
    return lambda: tf.raw_ops.DeepCopy(x=tensor)
