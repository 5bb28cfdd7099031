"""Layers: the attention gate and deformable convolution."""

from keras_das.layers.das import DASLayer
from keras_das.layers.deformable_conv2d import DeformableConv2D

__all__ = ["DASLayer", "DeformableConv2D"]
