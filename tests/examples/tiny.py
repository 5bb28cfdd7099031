"""A tiny replacement for ResNet-18, for tests of runs that do not depend on the network."""

import keras

from examples import backbones


def resnet18(image_size: int, small_stem: bool = False) -> keras.Model:
    """Four convolutions, each of which ends a stage."""
    x = inputs = keras.Input((image_size, image_size, 3))
    for number in range(1, 5):
        x = keras.layers.Conv2D(8, 3, 2 if number < 3 else 1, "same", name=f"stage{number}_conv")(x)
        x = keras.layers.BatchNormalization(name=f"stage{number}_norm")(x)
        x = keras.layers.ReLU(name=f"stage{number}")(x)
    return keras.Model(inputs, x, name="tiny")


def install() -> None:
    """Makes `--backbone resnet18` select the tiny network. Call it in a subprocess."""
    backbones.resnet18 = resnet18
