"""Writers of `keras_das.export`, one module per format."""
