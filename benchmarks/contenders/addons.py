"""`resampler` of tensorflow-addons for the samples, TensorFlow for the rest."""

import warnings

import numpy as np
import tensorflow as tf

from contenders import tensorflow_run
from problem import TAPS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warns that its development has ended
    import tensorflow_addons as tfa

VERSIONS = ("tensorflow-addons", "tensorflow")


def prepare(problem, mode, threads):
    n, h, w, c = problem.sizes
    rows, columns, tap = np.meshgrid(np.arange(h), np.arange(w), np.arange(TAPS), indexing="ij")
    at_rest = np.stack([columns - 1 + tap % 3, rows - 1 + tap // 3], -1).astype(np.float32)

    def convolve(inputs, kernel, offsets, mask):
        positions = at_rest + tf.reverse(tf.reshape(offsets, (n, h, w, TAPS, 2)), [-1])  # x, then y
        samples = tfa.image.resampler(inputs, positions) * mask[..., None]
        if problem.depthwise:
            return tf.reduce_sum(samples * tf.reshape(kernel, (TAPS, c)), axis=3)
        output = tf.reshape(samples, (-1, TAPS * c)) @ tf.reshape(kernel, (TAPS * c, -1))
        return tf.reshape(output, (n, h, w, -1))

    return tensorflow_run.prepare(problem, mode, "graph", convolve)
