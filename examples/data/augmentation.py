"""Augmentation of images by Keras layers."""

from __future__ import annotations

import keras


def augmentation(name: str, data_name: str = "") -> list[keras.Layer]:
    """The preprocessing layers for training batches."""
    if name == "auto":
        name = "aerial" if data_name == "trees" else "crop"
    layers = keras.layers
    policies = {
        "none": [],
        "flip": [layers.RandomFlip("horizontal")],
        # Aerial photographs have no upright orientation: flips in both directions, and changes of light.
        "aerial": [
            layers.RandomFlip("horizontal_and_vertical"),
            layers.RandomTranslation(0.1, 0.1, fill_mode="reflect"),
            layers.RandomZoom(0.15, fill_mode="reflect"),
            layers.RandomBrightness(0.15),
            layers.RandomContrast(0.2),
        ],
        "crop": [
            layers.RandomFlip("horizontal"),
            layers.RandomTranslation(0.125, 0.125, fill_mode="reflect"),
        ],
        # Zooms in up to 2.5 times at a random position, like random resized crops.
        "zoom": [
            layers.RandomFlip("horizontal"),
            layers.RandomTranslation(0.25, 0.25, fill_mode="reflect"),
            layers.RandomZoom((-0.6, 0.0), fill_mode="reflect"),
        ],
    }
    return policies[name]
