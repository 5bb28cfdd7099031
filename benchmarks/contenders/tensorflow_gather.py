"""Deformable convolution written with four `tf.gather` calls and bilinear weights."""

import numpy as np
import tensorflow as tf

from contenders import tensorflow_run
from problem import TAPS

VERSIONS = ("tensorflow", "tensorflow-cpu")


copy = tensorflow_run.copy


def prepare(problem, mode, threads, how, taps_at_once):
    return tensorflow_run.prepare(problem, mode, how, _convolution(problem, taps_at_once))


def _convolution(problem, taps_at_once):
    n, h, w, c = problem.sizes
    rows, columns, tap = np.meshgrid(np.arange(h), np.arange(w), np.arange(TAPS), indexing="ij")
    top, left = (rows - 1 + tap // 3).astype(np.float32), (columns - 1 + tap % 3).astype(np.float32)

    def convolve(inputs, kernel, offsets, mask):
        pixels = tf.reshape(inputs, (n, h * w, c))
        offsets = tf.reshape(offsets, (n, h, w, TAPS, 2))
        y, x = top + offsets[..., 0], left + offsets[..., 1]
        if taps_at_once:
            samples = _sample(pixels, h, w, *(tf.reshape(t, (n, -1)) for t in (y, x, mask)))
            if problem.depthwise:
                samples = tf.reshape(samples, (n, h, w, TAPS, c))
                return tf.reduce_sum(samples * tf.reshape(kernel, (TAPS, c)), axis=3)
            output = tf.reshape(samples, (-1, TAPS * c)) @ tf.reshape(kernel, (TAPS * c, -1))
            return tf.reshape(output, (n, h, w, -1))
        kernel = tf.reshape(kernel, (TAPS, -1, kernel.shape[-1]))
        output = 0.0
        for tap in range(TAPS):
            samples = _sample(pixels, h, w, *(tf.reshape(t[..., tap], (n, -1)) for t in (y, x, mask)))
            if problem.depthwise:
                output += samples * kernel[tap, 0]
            else:
                output += tf.reshape(tf.reshape(samples, (-1, c)) @ kernel[tap], (n, h * w, -1))
        return tf.reshape(output, (n, h, w, -1))

    return convolve


def _sample(pixels, height, width, y, x, mask):
    """Samples `pixels` (N, H * W, C) at `y` and `x` (N, samples), times `mask`: (N, samples, C)."""
    top, left = tf.floor(y), tf.floor(x)
    below, right = y - top, x - left
    result = 0.0
    for row, row_weight in ((top, 1 - below), (top + 1, below)):
        for column, column_weight in ((left, 1 - right), (left + 1, right)):
            on_image = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = tf.where(on_image, row_weight * column_weight, 0.0) * mask
            index = tf.clip_by_value(row, 0, height - 1) * width + tf.clip_by_value(column, 0, width - 1)
            result += tf.gather(pixels, tf.cast(index, tf.int32), batch_dims=1) * weight[..., None]
    return result
