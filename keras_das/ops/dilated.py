"""Dilated convolutions, traced for exports as one operation."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_das.ops.geometry import Window
from keras_das.ops.pointwise import traces_convolutions

Tensor = Any


def convolution(x: Tensor, kernel: Tensor, windows: Sequence[Window], padding: str) -> Tensor:
    """Returns the convolution of `x` with `kernel`.

    On TensorFlow, Keras splits the feature map into blocks and merges them after a dilated convolution.
    The runtimes of exported models dilate the kernel instead, which is faster.

    Args:
        x: Tensor `(N, H, W, C')`.
        kernel: Tensor `(rows, columns, C', C)` of the dtype of `x`.
        windows: Windows of the rows and of the columns.
        padding: `"valid"` or `"same"`.
    """
    strides, dilations = (tuple(getattr(w, name) for w in windows) for name in ("stride", "dilation"))
    if max(dilations) > 1 and traces_convolutions() and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Not "SAME", because onnxruntime 1.32 does not support it together with dilation.
        extents = [w.extent - 1 if padding == "same" else 0 for w in windows]
        sides = [(total // 2, total - total // 2) for total in extents]
        return tf.nn.conv2d(x, kernel, strides, [(0, 0), *sides, (0, 0)], dilations=dilations)
    return ops.conv(x, kernel, strides, padding=padding, data_format="channels_last", dilation_rate=dilations)
