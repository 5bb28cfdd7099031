"""What examples/detect.py is made of: data, detectors, metrics and pictures."""
