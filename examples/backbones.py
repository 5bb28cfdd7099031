"""Backbones by name: `keras.applications`, ResNet-18 and -20, and presets of KerasCV and KerasHub."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

import keras_das
from examples.common import UserError, first_line

NAMES = ("resnet18", "resnet20", "resnet50", "mobilenet_v2")
LIBRARIES = ("keras_cv", "keras_hub")
CAFFE_MEAN = (103.939, 116.779, 123.68)
"""Mean blue, green and red, subtracted for the ImageNet weights of keras.applications' ResNets."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A functional CNN without a head, and the preprocessing of pixels of 0..255."""

    model: keras.Model
    preprocess: Callable[[Any], Any]
    stages: Sequence[str] | None = None
    """The last layers of the stages; `None` if `keras_das.attach_das` detects them."""


def build(spec: str, image_size: int, pretrained: bool, small_stem: bool = False) -> Backbone:
    """Builds the backbone `spec`, with pretrained or random weights.

    `small_stem` removes the stride of the first layer of `resnet18`, for images of about 32 pixels.
    """
    if small_stem and spec != "resnet18":
        raise UserError("--small-stem requires --backbone resnet18")
    library, _, preset = spec.partition(":")
    if spec not in NAMES and not (library in LIBRARIES and preset):
        choices = ", ".join([*NAMES, *(f"{name}:PRESET" for name in LIBRARIES)])
        raise UserError(f"--backbone must be one of {choices}, not {spec!r}")
    if spec in ("resnet18", "resnet20"):
        if pretrained:
            raise UserError(f"{spec} has no ImageNet weights; pass a weights file or use resnet50")
        model = resnet18(image_size, small_stem) if spec == "resnet18" else resnet20(image_size)
        stages = [layer.name for layer in model.layers if re.fullmatch(r"stage\d", layer.name)]
        return Backbone(model, _to_unit_range, stages)
    try:
        if spec in NAMES:
            return _application(spec, image_size, pretrained)
        return {"keras_cv": _keras_cv, "keras_hub": _keras_hub}[library](preset, pretrained)
    # Any error of the library: no network, an unknown preset or folder, an unreadable file.
    except Exception as error:
        raise UserError(f"cannot load backbone {spec}: {first_line(error)}") from error


def attach_gates(
    model: keras.Model, identity_init: bool, das: Mapping[str, Any], at: Sequence[str] | None = None
) -> keras.Model:
    """Calls `keras_das.attach_das` with the arguments `das` of the command line.

    Raises:
        UserError: An argument is invalid.
    """
    try:
        return keras_das.attach_das(model, at, **{"identity_init": identity_init, **das})
    except (TypeError, ValueError) as error:
        given = "".join(f" --das {key}={value}" for key, value in das.items())
        raise UserError(f"cannot attach gates to {model.name}{given}: {first_line(error)}") from error


def _to_unit_range(pixels: Any) -> Any:
    return keras.layers.Rescaling(1 / 127.5, -1)(pixels)


def _to_caffe_range(pixels: Any) -> Any:
    return keras.layers.Normalization(mean=CAFFE_MEAN, variance=(1, 1, 1))(keras.ops.flip(pixels, axis=-1))


def _application(name: str, image_size: int, pretrained: bool) -> Backbone:
    applications = {"resnet50": keras.applications.ResNet50, "mobilenet_v2": keras.applications.MobileNetV2}
    model = applications[name](
        include_top=False,
        weights="imagenet" if pretrained else None,
        input_shape=(image_size, image_size, 3),
    )
    caffe = pretrained and name == "resnet50"
    return Backbone(model, _to_caffe_range if caffe else _to_unit_range)


def _keras_cv(preset: str, pretrained: bool) -> Backbone:
    library = import_library("keras_cv", "cv")
    model = library.models.Backbone.from_preset(preset, load_weights=pretrained)
    # Its presets rescale pixels unless configured otherwise.
    scales = getattr(model, "include_rescaling", False)
    return Backbone(model, (lambda pixels: pixels) if scales else keras.layers.Rescaling(1 / 255))


def _keras_hub(preset: str, pretrained: bool) -> Backbone:
    library = import_library("keras_hub", "hub")
    policy = keras.config.dtype_policy()
    model = library.models.Backbone.from_preset(preset, load_weights=pretrained, dtype=policy)
    try:
        converter = library.layers.ImageConverter.from_preset(preset)
    except (OSError, ValueError):  # a folder of only a backbone does not specify the range of its inputs
        return Backbone(model, _to_unit_range)
    scale, offset = converter.scale, converter.offset
    return Backbone(
        model, keras.layers.Rescaling(1 if scale is None else scale, 0 if offset is None else offset)
    )


def import_library(name: str, extra: str) -> Any:
    """Imports KerasCV or KerasHub; the error says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({first_line(error)}): pip install keras-das[{extra}]"
        ) from error


def resnet18(image_size: int, small_stem: bool = False) -> keras.Model:
    """ResNet-18 (He et al., 2015, arXiv 1512.03385) with random weights; `stage{i}` ends stage `i`."""
    inputs = keras.Input((image_size, image_size, 3))
    if small_stem:
        x = _convolution(inputs, 64, 3, 1, "stem")
    else:
        x = _convolution(inputs, 64, 7, 2, "stem")
        x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    return keras.Model(inputs, _stages(x, (64, 128, 256, 512), 2), name="resnet18")


def resnet20(image_size: int) -> keras.Model:
    """ResNet-20 of section 4.2 of the same paper, for images of about 32 pixels: three stages."""
    inputs = keras.Input((image_size, image_size, 3))
    x = _convolution(inputs, 16, 3, 1, "stem")
    return keras.Model(inputs, _stages(x, (16, 32, 64), 3), name="resnet20")


def _stages(x: Any, filters: Sequence[int], blocks: int) -> Any:
    """Stages of basic blocks; all except the first start with a stride of 2, and `stage{i}` ends each."""
    for number, width in enumerate(filters, start=1):
        for block in range(1, blocks + 1):
            name = f"stage{number}_block{block}"
            stride = 2 if number > 1 and block == 1 else 1
            x = _basic_block(x, width, stride, name, f"stage{number}" if block == blocks else None)
    return x


def _basic_block(x: Any, filters: int, stride: int, name: str, output_name: str | None) -> Any:
    shortcut = x
    if stride != 1 or x.shape[-1] != filters:
        shortcut = _convolution(x, filters, 1, stride, f"{name}_shortcut", relu=False)
    x = _convolution(x, filters, 3, stride, f"{name}_1")
    x = _convolution(x, filters, 3, 1, f"{name}_2", relu=False)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=output_name or f"{name}_relu")(x)


def _convolution(x: Any, filters: int, size: int, stride: int, name: str, relu: bool = True) -> Any:
    """A convolution without bias, batch normalization and, by default, a ReLU."""
    x = keras.layers.Conv2D(
        filters, size, stride, "same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
    )(x)
    x = keras.layers.BatchNormalization(name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x) if relu else x
