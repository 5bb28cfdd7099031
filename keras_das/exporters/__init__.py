"""What `keras_das.export` writes, one module a format."""
