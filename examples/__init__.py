"""Training scripts, one file a task: run them (`python examples/classify.py --help`) or import them."""
