"""Deformable attention (DAS) and deformable convolution for Keras 3."""

from keras_das import _requirements

_requirements.check_backend()  # before the imports below, whose errors would be less clear

from keras_das import ops, visualize
from keras_das._version import __version__
from keras_das.exporters import export
from keras_das.layers import DASLayer, DeformableConv2D
from keras_das.models import attach_das, freeze_trunk
from keras_das.ops.native import load_ops, portable

__all__ = [
    "DASLayer",
    "DeformableConv2D",
    "__version__",
    "attach_das",
    "export",
    "freeze_trunk",
    "load_ops",
    "ops",
    "portable",
    "visualize",
]
