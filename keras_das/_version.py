"""The one place that holds the version; read by the build and by ``keras_das.__version__``."""

__version__ = "0.1.0"
