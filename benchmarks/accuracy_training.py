"""One training run of accuracy.py, and its figures."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import accuracy_gates
from accuracy_tasks import Recipe, Split, Task, Trunk


@dataclasses.dataclass(frozen=True)
class Execution:
    """How trainings run: the results that accuracy.py compares are those of the defaults."""

    policy: str = "float32"
    jit_compile: bool = False
    epoch_in_one_call: bool = False


class Batches(keras.utils.PyDataset):
    """Batches of a split, with order, crops and flips determined by the seed and the epoch."""

    def __init__(self, split: Split, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.split, self.recipe, self.seed, self.epoch = split, recipe, seed, 0
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self.split.labels) // self.recipe.batch_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.recipe.batch_size
        chosen = self.order[index * size : (index + 1) * size]
        images = self.split.images[chosen]
        if self.recipe.crop:
            images = _random_crops(images, self.recipe.crop, self.rng)
        return images.astype("float32"), self.split.labels[chosen]

    def on_epoch_end(self) -> None:
        self.rng = np.random.default_rng([self.seed, self.epoch])
        self.order = self.rng.permutation(len(self.split.labels))
        self.epoch += 1


def _random_crops(images: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crops at random positions and flips with a probability of one half."""
    spare = images.shape[1] - size
    cropped = np.empty((len(images), size, size, 3), images.dtype)
    for image, out in zip(images, cropped, strict=True):
        top, left = rng.integers(spare + 1, size=2)
        out[:] = image[top : top + size, left : left + size][:, :: rng.choice((-1, 1))]
    return cropped


def center(images: np.ndarray, size: int | None) -> np.ndarray:
    """The center crops of the images, for evaluation."""
    margin = 0 if size is None else (images.shape[1] - size) // 2
    return images[:, margin : images.shape[1] - margin, margin : images.shape[2] - margin]


class _Clock(keras.callbacks.Callback):
    """The time of each call, of one step or more."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.calls.append(time.perf_counter() - self.began)


def train(
    task: Task,
    attach: Callable[[Trunk], keras.Model],
    seed: int,
    data: pathlib.Path | None,
    weights: pathlib.Path | None,
    execution: Execution = Execution(),
    save: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Trains one model, saves it as a `.keras` file if `save` is given, and returns its figures."""
    keras.config.set_dtype_policy(execution.policy)
    keras.utils.set_random_seed(seed)
    recipe = task.recipe
    training, test = task.load(data)
    size = recipe.crop or training.images.shape[1]
    trunk = task.trunk(size, weights)
    if recipe.frozen:
        trunk.model.trainable = False
        for layer in trunk.model.layers:
            layer.trainable = False
    classes = int(training.labels.max()) + 1
    # Created before the attention, so that all variants with one seed start from the same head.
    head = keras.layers.Dense(
        classes,
        name="classes",
        kernel_initializer=keras.initializers.GlorotUniform(seed),
        dtype="float32",
    )
    features = attach(trunk)
    model = _classifier(features, head, recipe.standardized)
    batches, clock = Batches(training, recipe, seed), _Clock()
    steps_per_call = len(batches) if execution.epoch_in_one_call else 1
    of_trunk = {layer.name for layer in trunk.model.layers}
    attention = [layer for layer in features.layers if layer.name not in of_trunk]
    optimizer = _optimizer(recipe, len(batches), attention)
    _compile(model, optimizer, recipe.label_smoothing, execution.jit_compile, steps_per_call)
    history = model.fit(batches, epochs=recipe.epochs, verbose=2, callbacks=[clock]).history
    if save is not None:
        keras.Model(model.input, model.output).save(save)  # without the loss, which Keras cannot load
    images = center(test.images, recipe.crop)
    logits = model.predict(images, batch_size=recipe.batch_size, verbose=0)
    calls = clock.calls[len(batches) // steps_per_call :] or clock.calls  # without those of the first epoch
    cam = {}
    if test.boxes is not None:
        last = features.output._keras_history.operation.name
        cam = {"cam_auc": accuracy_gates.cam_area(model, last, images, test)}
    return {
        "test_accuracy": float(np.mean(logits.argmax(-1) == test.labels)),
        "parameters": model.count_params(),
        "multiply_adds": accuracy_gates.multiply_adds(model),
        "seconds_per_step": float(np.median(calls)) / steps_per_call,
        "gates": accuracy_gates.describe(model, images, test.boxes),
        **cam,
        "history": {name: [round(value, 5) for value in values] for name, values in history.items()},
    }


def _classifier(features: keras.Model, head: keras.layers.Layer, standardized: bool) -> keras.Model:
    x = keras.layers.GlobalAveragePooling2D(name="pool")(features.output)
    if standardized:
        x = keras.layers.LayerNormalization(center=False, scale=False, name="standardize")(x)
    return keras.Model(features.input, head(x), name="classifier")


def _optimizer(
    recipe: Recipe, steps: int, attention: Iterable[keras.layers.Layer]
) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe for epochs of `steps` steps."""
    optimizer = _one_optimizer(recipe, recipe.learning_rate, steps)
    paths = [variable.path for layer in attention for variable in layer.trainable_variables]
    if recipe.attention_rate == 1 or not paths:
        return optimizer
    of_attention = _one_optimizer(recipe, recipe.attention_rate * recipe.learning_rate, steps)
    optimizers = keras.optimizers.OptimizerMap(optimizer, dict.fromkeys(paths, of_attention))
    return keras.optimizers.MultiOptimizer(optimizers)


def _one_optimizer(recipe: Recipe, peak: float, steps: int) -> keras.optimizers.Optimizer:
    warmup = int(recipe.warmup_epochs * steps)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else peak,
        recipe.epochs * steps - warmup,
        warmup_target=peak if warmup else None,
        warmup_steps=warmup,
    )
    if recipe.optimizer == "sgd":
        return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=recipe.weight_decay)
    return keras.optimizers.AdamW(rate, weight_decay=recipe.weight_decay)


def _compile(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    label_smoothing: float,
    jit_compile: bool,
    steps_per_call: int,
) -> None:
    def loss(labels: Any, logits: Any) -> Any:
        targets = tf.one_hot(tf.cast(tf.reshape(labels, [-1]), tf.int32), logits.shape[-1])
        return keras.losses.categorical_crossentropy(
            targets, logits, from_logits=True, label_smoothing=label_smoothing
        )

    model.compile(
        optimizer,
        loss,
        metrics=["sparse_categorical_accuracy"],
        jit_compile=jit_compile,
        steps_per_execution=steps_per_call,
    )
