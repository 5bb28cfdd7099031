"""Modules of examples/detect.py: data, detectors, metrics and pictures."""
