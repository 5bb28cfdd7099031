"""Modules of `explore.py`: pictures, views of models, and the page."""
