"""A network in the place of ResNet-18, for tests that are about the run and not about the network."""

import keras

from examples import backbones


def resnet18(image_size: int, small_stem: bool = False) -> keras.Model:
    """Four convolutions, each the end of a stage."""
    x = inputs = keras.Input((image_size, image_size, 3))
    for number in range(1, 5):
        x = keras.layers.Conv2D(8, 3, 2 if number < 3 else 1, "same", name=f"stage{number}_conv")(x)
        x = keras.layers.BatchNormalization(name=f"stage{number}_norm")(x)
        x = keras.layers.ReLU(name=f"stage{number}")(x)
    return keras.Model(inputs, x, name="tiny")


def install() -> None:
    """Let `--backbone resnet18` mean the tiny network, in a process of a test's own."""
    backbones.resnet18 = resnet18
