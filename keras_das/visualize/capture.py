"""Runs a model and captures or replaces what its layers compute."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_das.models.graph import run

Tensor = Any
_lock = threading.RLock()


def run_batch(model: keras.Model, images: Any) -> Any:
    """Returns the model's outputs for a batch of its input, or of all its inputs."""
    several = isinstance(model, keras.Function) and len(model.inputs) > 1
    if several and not isinstance(images, list | tuple | Mapping):
        names = [tensor.name for tensor in model.inputs]
        raise ValueError(f"`images` must be a list or dict of batches for the model's inputs {names}.")
    return model(images, training=False) if several else run(model, images)


def inputs_of(
    run_model: Callable[[], Any], layers: Sequence[Any], order: list[Any] | None = None
) -> list[Tensor]:
    """Runs the model and returns the input of each layer. `order` collects the layers as they run."""
    ran: list[Any] = [] if order is None else order

    def note(layer: Any, call: Callable[..., Any], x: Tensor) -> Any:
        ran.append(layer)
        return call(x)

    with replaced_call(layers, note) as seen:
        run_model()
    return [only_call(layer, [x for x, _ in seen[id(layer)]]) for layer in layers]


@contextlib.contextmanager
def replaced_call(
    layers: Sequence[Any], replacement: Callable[[Any, Callable[..., Any], Tensor], Any]
) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Context manager: layers compute `replacement(layer, call, x)`. Yields inputs and outputs by `id`.

    Unlike a model of the same layers, this also works for nested models and subclasses. One thread at a time
    can be in such a context, because layers are changed in place.
    """
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {id(layer): [] for layer in layers}

    def replaced(layer: Any) -> Callable[..., Any]:
        original = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            if not args:  # the input is passed by its name
                args = (kwargs.pop(next(iter(inspect.signature(original).parameters))),)
            output = replacement(layer, lambda x: original(x, *args[1:], **kwargs), args[0])
            seen[id(layer)].append((args[0], output))
            return output

        return call

    with _lock, _restored_calls(layers):
        for layer in layers:  # bypasses Keras' __setattr__, which tracks state
            object.__setattr__(layer, "call", replaced(layer))
        yield seen


@contextlib.contextmanager
def _restored_calls(layers: Sequence[Any]) -> Iterator[None]:
    """Context after which layers have the `call` that they had before, which may be one that the user set."""
    own = [vars(layer).get("call") for layer in layers]
    try:
        yield
    finally:
        for layer, call in zip(layers, own, strict=True):
            if call is None:
                vars(layer).pop("call", None)
            else:
                object.__setattr__(layer, "call", call)


def only_call(layer: Any, values: Sequence[Tensor]) -> Tensor:
    """Returns the value of the only call of a layer, or raises a ValueError."""
    if len(values) != 1:
        raise ValueError(
            f"Each layer must be called once when the model runs. Received: layer {layer.name!r}, which is "
            f"called {len(values)} times"
        )
    return values[0]
