"""Attention gates for KerasHub, KerasCV, `keras.applications` and any functional CNN."""

from keras_das.models.attach import attach_das
from keras_das.models.freezing import freeze_trunk
from keras_das.models.registry import register_lazily

# Saved models name these classes. They derive from classes of KerasHub and KerasCV, which `import keras_das`
# must neither need nor wait for.
register_lazily("keras_das.models.keras_cv", "DASCVBackbone", library="keras-cv")
register_lazily("keras_das.models.keras_hub", "DASHubBackbone", library="keras-hub")
register_lazily("keras_das.models.keras_hub", "DASImageClassifier", library="keras-hub")

__all__ = ["attach_das", "freeze_trunk"]
