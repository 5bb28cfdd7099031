"""Operations on tensors: deformable convolution."""

from keras_das.ops.deformable import deformable_conv2d

__all__ = ["deformable_conv2d"]
