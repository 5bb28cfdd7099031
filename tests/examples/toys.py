"""Small models and images for the tests of `explore.py`."""

import json
from pathlib import Path

import keras
import numpy as np
from PIL import Image

import keras_das

RED, GREEN, BLUE = (200, 40, 40), (40, 200, 40), (40, 40, 200)


def toy(shape=(64, 64, 3), gates=2, classes=2, activation="softmax", name="toy"):
    """Two convolutions with stride 2, with a gate after each, after the first, or none."""
    x = inputs = keras.Input(shape, name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1, name="scaled")(x)
    for number in (1, 2):
        x = keras.layers.Conv2D(16, 3, 2, "same", activation="relu", name=f"stage{number}")(x)
        if number <= gates:
            # Makes offsets and gates visible. Initially, a gate samples a grid and treats all positions
            # equally.
            x = keras_das.DASLayer(offset_initializer="random_normal", name=f"das_{number}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = keras.layers.Dense(classes, activation, name="classes")(x)
    return keras.Model(inputs, outputs, name=name)


def save(model, folder: Path, class_names=None, data=None) -> Path:
    """Saves a model to a folder in the same way as `classify.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    if class_names:
        arguments = {"data": data, "seed": 0, "data_dir": None} if data else {}
        (folder / "results.json").write_text(json.dumps({"class_names": class_names, "arguments": arguments}))
    return folder / "model.keras"


def photograph(width=90, height=70, seed=0) -> Image.Image:
    """Color noise that is coarse enough to survive resizing."""
    pixels = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype="uint8")
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
