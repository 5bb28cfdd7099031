"""Exports for serving: `dispatch.py` contains `export`, the other modules write one format each."""

from keras_das.exporters.dispatch import export

__all__ = ["export"]
