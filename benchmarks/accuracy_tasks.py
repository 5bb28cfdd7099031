"""The tasks of accuracy.py: images, networks without attention, and recipes."""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras_das.models.stages import find_stages
from PIL import Image

import clutter

Tensor = Any


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of 0..255 with labels and, optionally, boxes."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A network without a head, and the layers to which attention is attached."""

    model: keras.Model
    stages: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The recipe for all variants of a task."""

    epochs: int
    batch_size: int
    optimizer: str  # "adamw", or "sgd" with a momentum of 0.9
    learning_rate: float  # decays to 0 by a cosine
    weight_decay: float
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    crop: int | None = None  # random crops of this size and flips in training, center crops otherwise
    frozen: bool = False  # whether the trunk is frozen
    attention_rate: float = 1.0  # the learning rate of attention relative to that of the other weights
    standardized: bool = False  # whether the pooled features are standardized for the head, image by image


@dataclasses.dataclass(frozen=True)
class Task:
    """A task on which variants of attention are compared."""

    title: str
    load: Callable[[pathlib.Path | None], tuple[Split, Split]]
    trunk: Callable[[int, pathlib.Path | None], Trunk]
    recipe: Recipe


# Images


@functools.cache
def _clutter(
    train: int, fragments: int, scale: tuple[float, float], fragment: tuple[float, float] = clutter.FRAGMENT
) -> tuple[Split, Split]:
    parts = clutter.load(train, 2000, fragments, scale, fragment)
    return tuple(Split(part.images, part.labels, part.boxes) for part in parts)


def _folder(path: pathlib.Path | None, size: int) -> tuple[Split, Split]:
    """`train/CLASS/*.jpg` and `test/CLASS/*.jpg`: the resized center square of each photograph."""
    if path is None:
        raise SystemExit("--data is required: the folder that contains train/ and test/")
    classes = sorted(folder.name for folder in (path / "train").iterdir())
    return tuple(_read(path / part, classes, size) for part in ("train", "test"))


def _read(folder: pathlib.Path, classes: Sequence[str], size: int) -> Split:
    files = [
        (file, label) for label, name in enumerate(classes) for file in sorted((folder / name).iterdir())
    ]
    images = np.empty((len(files), size, size, 3), "uint8")

    def read(index: int) -> None:
        with Image.open(files[index][0]) as image:
            left, top = ((side - min(image.size)) // 2 for side in image.size)
            square = (left, top, left + min(image.size), top + min(image.size))
            images[index] = image.convert("RGB").resize((size, size), Image.Resampling.BOX, square)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(files))))
    return Split(images, np.array([label for _, label in files]))


# Networks


def _convolution(
    x: Tensor, filters: int, strides: int, name: str, relu: bool = True, size: int = 3
) -> Tensor:
    x = keras.layers.Conv2D(
        filters,
        size,
        strides,
        "same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    x = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x) if relu else x


def _block(x: Tensor, filters: int, strides: int, name: str) -> Tensor:
    """A basic residual block."""
    shortcut = x
    if strides > 1 or x.shape[-1] != filters:
        shortcut = _convolution(x, filters, strides, f"{name}_shortcut", relu=False, size=1)
    x = _convolution(x, filters, strides, f"{name}_1")
    x = _convolution(x, filters, 1, f"{name}_2", relu=False)
    return keras.layers.ReLU(name=f"{name}_out")(keras.layers.Add(name=f"{name}_add")([x, shortcut]))


def _small_cnn(size: int, weights: pathlib.Path | None, residual: bool) -> Trunk:
    """Four convolutions; with `residual`, a residual block after each."""
    inputs = keras.Input((size, size, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    stages = []
    for number, width in enumerate((16, 32, 48, 64)):
        x = _convolution(x, width, 2 if number else 1, f"stage{number}")
        if residual:
            x = _block(x, width, 1, f"stage{number}_block")
        stages.append(x._keras_history.operation.name)
    return Trunk(keras.Model(inputs, x, name="trunk"), stages[1:])


def _small_resnet(size: int, weights: pathlib.Path | None) -> Trunk:
    """A ResNet with one basic block per stage and 24, 48, 96 and 192 channels: 0.7 M weights."""
    inputs = keras.Input((size, size, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    x = _convolution(x, 24, 2, "stem")
    stages = []
    for number, width in enumerate((24, 48, 96, 192)):
        x = _block(x, width, 2 if number else 1, f"stage{number}")
        stages.append(x._keras_history.operation.name)
    return Trunk(keras.Model(inputs, x, name="trunk"), stages)


def resnet18_backbone(size: int | None, weights: pathlib.Path) -> keras.Model:
    """KerasHub's ResNet of basic blocks with ImageNet weights, from an archive of arrays.

    The archive contains `stem` and `stageS/blockB/{conv1,conv2,shortcut}`, each with `kernel`, `gamma`,
    `beta`, `moving_mean` and `moving_variance`, and `mean_rgb`, which the caller subtracts from the pixels.
    """
    import keras_hub

    arrays = np.load(weights)
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[2, 2, 2, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        image_shape=(size, size, 3),
    )
    for name in sorted({key.rpartition("/")[0] for key in arrays} - {""}):
        _fill(backbone, name, arrays)
    return backbone


def _resnet18(size: int, weights: pathlib.Path | None) -> Trunk:
    """The network of `resnet18_backbone`, as one graph that subtracts the mean itself."""
    if weights is None:
        raise SystemExit("--weights is required: the archive of the ResNet-18's weights")
    backbone = resnet18_backbone(size, weights)
    inputs = keras.Input((size, size, 3), name="image")
    stages = [tensor._keras_history.operation.name for tensor in backbone.pyramid_outputs.values()]
    layers = keras.Model(backbone.input, backbone.output, name="resnet18")
    mean = np.load(weights)["mean_rgb"]
    shift = keras.layers.Rescaling(1.0, (-mean).tolist(), name="mean")
    shifted = keras.Model(inputs, layers(shift(inputs)), name="trunk")
    return Trunk(_flat(shifted, layers, shift), stages)


def _keras_file(size: int, weights: pathlib.Path | None, stages: Sequence[str] | None = None) -> Trunk:
    """The network without a head of a Keras file, whose inputs are RGB images of 0..255.

    Without `stages`, attention follows the layers that `attach_das` selects.
    """
    if weights is None:
        raise SystemExit("--weights is required: the Keras file of the network")
    model = keras.models.load_model(weights)
    if stages is None:
        stages = [stage._keras_history.operation.name for stage in find_stages(model).values()]
    return Trunk(model, stages)


def _flat(model: keras.Model, inner: keras.Model, first: keras.layers.Layer) -> keras.Model:
    """Merges `first` and the layers of `inner` into one graph."""
    inputs = keras.Input(model.input.shape[1:], name="image")
    known = {id(inner.input): first(inputs)}
    for layer in inner.layers[1:]:
        arguments = keras.tree.map_structure(lambda x: known[id(x)], layer.input)
        known[id(layer.output)] = layer(arguments)
    return keras.Model(inputs, known[id(inner.output)], name=model.name)


def _fill(backbone: keras.Model, name: str, arrays: Any) -> None:
    """Sets the weights of a convolution and its batch norm."""
    target = "conv1"
    if name != "stem":
        stage, block, part = name.split("/")
        number = {"shortcut": 0, "conv1": 1, "conv2": 2}[part]
        target = f"stack{stage[-1]}_block{block[-1]}_{number}"
    backbone.get_layer(f"{target}_conv").set_weights([arrays[f"{name}/kernel"].astype("float32")])
    norms = ("gamma", "beta", "moving_mean", "moving_variance")
    backbone.get_layer(f"{target}_bn").set_weights([arrays[f"{name}/{norm}"] for norm in norms])


# Fixed before the first comparison, and the same for all variants.
_CLUTTER = Recipe(epochs=10, batch_size=64, optimizer="adamw", learning_rate=3e-3, weight_decay=4e-3)
_ADAPTERS = Recipe(6, 32, "adamw", 3e-3, 4e-3, warmup_epochs=0.5, crop=96, frozen=True, standardized=True)
_FINE_TUNING = dataclasses.replace(_ADAPTERS, learning_rate=3e-4, frozen=False)
TASKS = {
    "clutter": Task(
        "Clutter: digits scaled 1.5 to 4 times among 8 fragments, four convolutions, from scratch",
        lambda data: _clutter(5000, 8, (1.5, 4.0)),
        functools.partial(_small_cnn, residual=False),
        _CLUTTER,
    ),
    "clutter_hard": Task(
        "Harder clutter: digits scaled 1.2 to 2.5 times among 24 fragments, a residual block a stage",
        # Fragments as in Mnih et al., of 8 pixels where the digit has 28.
        lambda data: _clutter(2500, 24, (1.2, 2.5), fragment=(0.25, 0.33)),
        functools.partial(_small_cnn, residual=True),
        dataclasses.replace(_CLUTTER, epochs=20),
    ),
    "woof": Task(
        "Imagewoof at 64 pixels, ResNet of 0.7 M weights, from scratch",
        functools.partial(_folder, size=72),
        _small_resnet,
        Recipe(15, 64, "sgd", 0.1, 5e-3, warmup_epochs=1, label_smoothing=0.1, crop=64),
    ),
    "dogs": Task(
        "Stanford Dogs at 112 pixels, ResNet of 0.7 M weights, from scratch",
        functools.partial(_folder, size=128),
        _small_resnet,
        Recipe(30, 64, "sgd", 0.1, 5e-3, warmup_epochs=1, label_smoothing=0.1, crop=112),
    ),
    "grocery": Task(
        "GroceryStore at 96 pixels, adapters on a frozen ImageNet ResNet-18",
        functools.partial(_folder, size=104),
        _resnet18,
        _ADAPTERS,
    ),
    "grocery_mobile": Task(
        "GroceryStore at 96 pixels, adapters on a frozen ImageNet MobileNetV2",
        functools.partial(_folder, size=104),
        _keras_file,
        _ADAPTERS,
    ),
    "grocery_mobile_sums": Task(
        "The same MobileNetV2, with attention after the residual sums instead of the expansions",
        functools.partial(_folder, size=104),
        functools.partial(_keras_file, stages=("block_2_add", "block_5_add", "block_12_add", "out_relu")),
        _ADAPTERS,
    ),
    "grocery_full": Task(
        "GroceryStore at 96 pixels, fine-tuning all weights of an ImageNet ResNet-18",
        functools.partial(_folder, size=104),
        _resnet18,
        _FINE_TUNING,
    ),
    "grocery_full_rates": Task(
        "The same fine-tuning, with attention at ten times the learning rate of the other weights",
        functools.partial(_folder, size=104),
        _resnet18,
        dataclasses.replace(_FINE_TUNING, attention_rate=10.0),
    ),
}
