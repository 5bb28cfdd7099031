"""Deformable attention (DAS) and deformable convolution for Keras 3."""

from keras_das import ops
from keras_das._version import __version__

__all__ = ["__version__", "ops"]
