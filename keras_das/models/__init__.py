"""Attention gates for KerasHub, KerasCV, `keras.applications` and any functional CNN."""

from keras_das.models.attach import attach_das
from keras_das.models.freezing import freeze_trunk
from keras_das.models.registry import register_lazily

# Saved models refer to these classes. They are subclasses of classes of KerasHub and KerasCV, which
# `import keras_das` neither requires nor imports.
register_lazily("keras_das.models.keras_cv", "DASCVBackbone", library="keras-cv")
register_lazily("keras_das.models.keras_hub", "DASHubBackbone", library="keras-hub")
register_lazily("keras_das.models.keras_hub", "DASImageClassifier", library="keras-hub")

__all__ = ["attach_das", "freeze_trunk"]
