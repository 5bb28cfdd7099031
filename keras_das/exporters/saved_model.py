"""SavedModels of standard operations, with optional labels, signatures and warm-up requests."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_das.exporters import saved_model_sampling
from keras_das.models.graph import run
from keras_das.ops import native
from keras_das.ops.arguments import standardize_count, standardize_pair
from keras_das.ops.deformable import substituted

Tensor = Any
_TOP = 5  # number of classes in `labels`
_FILE = "saved_model.pb"
_COMPILED = "_XlaMustCompile"  # TensorFlow's attribute for `jit_compile=True`


@dataclasses.dataclass
class Serving:
    """Options of a SavedModel besides the model; see `keras_das.export`."""

    labels: Sequence[str] | None = None
    serving_bytes: bool = False
    image_size: tuple[int, int] | None = None
    preprocessing: Callable[[Tensor], Tensor] | None = None
    warmup: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Validates the options that do not depend on the model."""
        if self.preprocessing is not None and not self.serving_bytes:
            raise ValueError("`preprocessing` requires serving_bytes=True.")
        if self.image_size is not None and not (self.serving_bytes or np.size(self.warmup)):
            raise ValueError("`image_size` requires serving_bytes=True or `warmup`.")
        if self.labels is not None and not isinstance(self.labels, str):
            self.labels = tuple(self.labels)
        if self.image_size is not None:
            self.image_size = standardize_pair(self.image_size, "image_size")
        sizes = self.warmup if isinstance(self.warmup, Sequence | np.ndarray) else [self.warmup]
        self.warmup = tuple(standardize_count(size, "warmup") for size in sizes)

    def is_plain(self) -> bool:
        """Whether no options are set."""
        return self == Serving()


def write(model: keras.Model, folder: Path, verbose: bool, serving: Serving) -> None:
    """Writes a SavedModel to a new folder; see `keras_das.export`."""
    with native.portable(), _fast_sampling():
        if serving.is_plain():
            model.export(str(folder), format="tf_saved_model", verbose=verbose)
        else:
            _write_signatures(model, folder, verbose, serving)
    check_operations(folder)


def _fast_sampling() -> contextlib.AbstractContextManager[None]:
    """Context manager: deformable convolutions sample by one operation, which only TensorFlow has."""
    if keras.backend.backend() == "tensorflow":
        return substituted(saved_model_sampling.deformable_conv2d)
    return contextlib.nullcontext()


def read(folder: Path) -> Any:
    """Returns the protocol buffer of a SavedModel."""
    from tensorflow.core.protobuf import saved_model_pb2

    return saved_model_pb2.SavedModel.FromString((folder / _FILE).read_bytes())


def nodes(proto: Any) -> Iterator[Any]:
    """Yields the operations in the graphs and functions of a SavedModel."""
    for meta_graph in proto.meta_graphs:
        yield from meta_graph.graph_def.node
        for function in meta_graph.graph_def.library.function:
            yield from function.node_def


def compile_nothing(folder: Path) -> None:
    """Removes XLA compilation from all functions, including those of Keras' grouped convolutions."""
    proto = read(folder)
    functions = [
        function for meta_graph in proto.meta_graphs for function in meta_graph.graph_def.library.function
    ]
    for part in (*functions, *nodes(proto)):
        if _COMPILED in part.attr:
            del part.attr[_COMPILED]
    (folder / _FILE).write_bytes(proto.SerializeToString())


def custom_operations(path: Path) -> list[str]:
    """Returns the sorted names of operations in a SavedModel that TensorFlow does not have."""
    # TensorFlow reserves names with a namespace for custom operations.
    return sorted({node.op for node in nodes(read(path)) if ">" in node.op})


def check_operations(path: Path) -> None:
    """Raises a ValueError if the SavedModel contains operations that a server does not have."""
    custom = custom_operations(path)
    if custom:
        raise ValueError(
            f"The export contains operations that TensorFlow Serving does not support: {', '.join(custom)}. "
            "`model` must contain only layers with standard operations."
        )


def _write_signatures(model: keras.Model, folder: Path, verbose: bool, serving: Serving) -> None:
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`labels`, `serving_bytes` and `warmup` require Keras on TensorFlow. "
            f"Received: backend {keras.backend.backend()!r}"
        )
    is_graph = isinstance(model, keras.Function | keras.Sequential)
    if not is_graph or len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            "`model` must be a functional or sequential model with one input and one output for `labels`, "
            f"`serving_bytes` and `warmup`. Received: model={model} of class {type(model).__name__}"
            + (f" with {len(model.inputs)} inputs and {len(model.outputs)} outputs" if is_graph else "")
        )
    image = model.inputs[0]
    _check_labels(model, serving.labels)

    def serve(images: Tensor) -> dict[str, Tensor]:
        (scores,) = keras.tree.flatten(run(model, images))
        return {"output_0": scores, **_named(scores, serving.labels)}

    archive = keras.export.ExportArchive()
    archive.track(model)
    shape = (None, *image.shape[1:])
    archive.add_endpoint("serve", serve, [tf.TensorSpec(shape, image.dtype, name=image.name)])
    requests = [
        (sanitized(image.name), "serving_default", lambda count: _blank_images(image, count, serving))
    ]
    if serving.serving_bytes:
        size, channels_first = _image_layout(image, serving.image_size)

        def from_bytes(image_bytes: Tensor) -> dict[str, Tensor]:
            images = _decode(image_bytes, size)
            if serving.preprocessing is not None:
                images = serving.preprocessing(images)
            elif channels_first:
                images = tf.transpose(images, (0, 3, 1, 2))
            rounded = tf.round(images) if tf.as_dtype(image.dtype).is_integer else images
            return serve(tf.cast(rounded, image.dtype))

        archive.add_endpoint(
            "serving_bytes", from_bytes, [tf.TensorSpec((None,), tf.string, name="image_bytes")]
        )
        requests.append(("image_bytes", "serving_bytes", lambda count: _blank_files(size, count)))
    archive.write_out(str(folder), verbose=verbose)
    if serving.warmup:
        _write_warmup(folder, [(*request, count) for request in requests for count in serving.warmup])


def _check_labels(model: keras.Model, labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    shape = model.outputs[0].shape
    names = not isinstance(labels, str) and all(isinstance(label, str) for label in labels)
    if len(shape) != 2 or not names or len(labels) != shape[1]:
        raise ValueError(
            "`labels` must contain a string for each class of the model's output (N, classes), here "
            f"{shape}. Received: {len(labels) if names else repr(labels)}"
        )


def sanitized(name: str) -> str:
    """Returns the name of an input in TensorFlow's signatures, which are those of Python functions."""
    name = "".join(character if character.isalnum() else "_" for character in name)
    return name if name[0].isalpha() else f"arg_{name}"


def _named(scores: Tensor, labels: Sequence[str] | None) -> dict[str, Tensor]:
    """Returns the best classes and their scores, best first."""
    import tensorflow as tf

    if labels is None:
        return {}
    best = tf.math.top_k(scores, min(_TOP, len(labels)))
    return {"labels": tf.gather(tf.constant(list(labels)), best.indices), "scores": best.values}


def _image_layout(image: Tensor, image_size: tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
    """Returns rows and columns of the model's images, and whether channels come first."""
    shape = tuple(image.shape)
    channels_first = len(shape) == 4 and shape[1] == 3 and shape[3] != 3
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise ValueError(
            f"`serving_bytes` requires a model of images with 3 channels. Received: shape {shape}"
        )
    own = shape[2:] if channels_first else shape[1:3]
    size = tuple(own if image_size is None else image_size)
    if len(size) != 2 or not all(
        isinstance(n, int) and m in (n, None) for n, m in zip(size, own, strict=True)
    ):
        raise ValueError(
            f"`image_size` must be (rows, columns) that the model accepts, here {own}. "
            f"Received: image_size={image_size!r}"
        )
    return (size[0], size[1]), channels_first


def _decode(image_bytes: Tensor, size: tuple[int, int]) -> Tensor:
    """Decodes JPEG, PNG, BMP or GIF files (first frame) to float32 pixels `(N, *size, 3)` of 0..255."""
    import tensorflow as tf

    def decode(content: Tensor) -> Tensor:
        image = tf.io.decode_image(content, channels=3, expand_animations=False)
        image.set_shape((None, None, 3))
        return tf.image.resize(image, size, antialias=True)

    return tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec((*size, 3), tf.float32))


# Warm-up requests


def _blank_images(image: Tensor, count: int, serving: Serving) -> Tensor:
    import tensorflow as tf

    shape = list(image.shape[1:])
    if None in shape and serving.image_size is not None:
        size, channels_first = _image_layout(image, serving.image_size)
        shape = [3, *size] if channels_first else [*size, 3]
    if None in shape:
        raise ValueError(
            f"`warmup` requires a model of images of one size, or `image_size`. Received: shape {image.shape}"
        )
    return tf.zeros((count, *shape), image.dtype)


def _blank_files(size: tuple[int, int], count: int) -> Tensor:
    import tensorflow as tf

    return tf.fill((count,), tf.io.encode_jpeg(tf.zeros((*size, 3), tf.uint8)))


def _write_warmup(folder: Path, requests: Sequence[tuple[str, str, Callable[[int], Tensor], int]]) -> None:
    """Writes requests that TensorFlow Serving runs before it accepts others.

    They are `PredictionLog` messages of tensorflow-serving-api. They are assembled from field numbers, which
    are stable, so that the package is not required.
    """
    import tensorflow as tf

    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for name, signature, make, count in requests:
            tensor = tf.make_tensor_proto(make(count)).SerializeToString()
            model_spec = _field(3, signature.encode())
            inputs = _field(1, name.encode()) + _field(2, tensor)  # an entry of a map
            request = _field(1, model_spec) + _field(2, inputs)
            writer.write(_field(6, _field(1, request)))  # PredictionLog.predict_log.request


def _field(number: int, content: bytes) -> bytes:
    """Encodes a bytes field of a protocol buffer: key, length, content."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
