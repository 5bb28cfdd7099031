"""Deformable attention (DAS) and deformable convolution for Keras 3."""

from keras_das import ops
from keras_das._version import __version__
from keras_das.layers import DASLayer, DeformableConv2D

__all__ = ["DASLayer", "DeformableConv2D", "__version__", "ops"]
