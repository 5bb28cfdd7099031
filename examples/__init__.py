"""Training scripts, one file per task: run them (`python examples/classify.py --help`) or import them."""
