"""`keras_das.ops.deformable_conv2d` on TensorFlow."""

import functools

import keras_das

from contenders import tensorflow_run

VERSIONS = ("keras-das", "keras", "tensorflow", "tensorflow-cpu")


copy = tensorflow_run.copy


def prepare(problem, mode, threads, implementation, how, calls=1):
    convolve = functools.partial(
        keras_das.ops.deformable_conv2d, padding="same", implementation=implementation
    )
    return tensorflow_run.prepare(problem, mode, how, convolve, calls)
