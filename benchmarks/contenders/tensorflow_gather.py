"""Deformable convolution as TensorFlow users write it today: four `tf.gather`s weighted bilinearly."""

import numpy as np
import tensorflow as tf

from contenders import tensorflow_run
from problem import TAPS

VERSIONS = ("tensorflow", "tensorflow-cpu")


def prepare(problem, mode, threads, how, taps_at_once):
    return tensorflow_run.prepare(problem, mode, how, _convolution(problem, taps_at_once))


def _convolution(problem, taps_at_once):
    n, h, w, c = problem.sizes
    rows, columns, tap = np.meshgrid(np.arange(h), np.arange(w), np.arange(TAPS), indexing="ij")
    at_rest = np.stack([rows - 1 + tap // 3, columns - 1 + tap % 3], -1).astype(np.float32)

    def convolve(inputs, kernel, offsets, mask):
        pixels = tf.reshape(inputs, (n, h * w, c))
        positions = at_rest + tf.reshape(offsets, (n, h, w, TAPS, 2))
        if taps_at_once:
            samples = _sample(pixels, h, w, tf.reshape(positions, (n, -1, 2)), tf.reshape(mask, (n, -1)))
            samples = tf.reshape(samples, (n, h, w, TAPS, c))
            if problem.depthwise:
                return tf.reduce_sum(samples * tf.reshape(kernel, (TAPS, c)), axis=3)
            output = tf.reshape(samples, (-1, TAPS * c)) @ tf.reshape(kernel, (TAPS * c, -1))
            return tf.reshape(output, (n, h, w, -1))
        output = 0.0
        for tap in range(TAPS):
            position = tf.reshape(positions[..., tap, :], (n, -1, 2))
            samples = _sample(pixels, h, w, position, tf.reshape(mask[..., tap], (n, -1)))
            weights = kernel[tap // 3, tap % 3]
            if problem.depthwise:
                output += samples * weights[0]
            else:
                output += tf.reshape(samples, (-1, c)) @ weights
        return tf.reshape(output, (n, h, w, -1))

    return convolve


def _sample(pixels, height, width, positions, mask):
    """Reads `pixels` (N, H * W, C) at `positions` (N, samples, 2), times `mask`: (N, samples, C)."""
    corner = tf.floor(positions)
    fraction = positions - corner
    result = 0.0
    for down in (0, 1):
        for right in (0, 1):
            row, column = corner[..., 0] + down, corner[..., 1] + right
            weight = tf.abs(1.0 - down - fraction[..., 0]) * tf.abs(1.0 - right - fraction[..., 1])
            on_image = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = tf.where(on_image, weight, 0.0) * mask
            index = tf.clip_by_value(row, 0, height - 1) * width + tf.clip_by_value(column, 0, width - 1)
            result += tf.gather(pixels, tf.cast(index, tf.int32), batch_dims=1) * weight[..., None]
    return result
