"""`export`: models as files that run without Keras and without this package."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_das._requirements import check_keras_3
from keras_das.exporters import litert, onnx, openvino, saved_model
from keras_das.exporters.saved_model import Serving

FORMATS = ("saved_model", "onnx", "litert", "openvino")
_SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}  # of the formats that are a file
_MEMBERS = {"saved_model": "saved_model.pb", "openvino": "model.xml"}  # of those that are a folder


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str = "saved_model",
    verbose: bool = False,
    labels: Sequence[str] | None = None,
    serving_bytes: bool = False,
    image_size: tuple[int, int] | None = None,
    preprocessing: Callable[[Any], Any] | None = None,
    warmup: Sequence[int] = (),
) -> None:
    """Writes a model for serving.

    What is written runs without this package, and takes batches of any size (of images of any size, if the
    model does):

    - `"saved_model"`: a folder for TensorFlow Serving, of standard TensorFlow operations, which is checked.
    - `"onnx"`: a `.onnx` file of opset 19, with one `DeformConv` for each deformable convolution. Its border
      is ours; a NaN in an offset may give any number. bfloat16 becomes float32. Inputs and outputs are in
      Keras' order. Needs the extra `export`, and Keras on TensorFlow.
    - `"litert"`: a `.tflite` file of LiteRT's own operations, which computes in float32 whatever the model's
      precision. Needs Keras on TensorFlow.
    - `"openvino"`: a folder of `model.xml` and `model.bin`, with one `DeformableConvolution` for each, by way
      of ONNX. Needs the extra `export`, and Keras on TensorFlow.

    It is written beside `path` and moved there when it is complete: if anything goes wrong, what stood at
    `path` still does.

    Args:
        model: A built Keras model.
        path: The file or folder to write. One of the same format that stands there is replaced; any other
            file, or folder with content, is an error.
        format: `"saved_model"`, `"onnx"`, `"litert"` or `"openvino"`.
        verbose: Whether Keras prints the signatures.
        labels: Names of the classes of a model with one output `(N, classes)`. The SavedModel's signatures
            then also give `labels`, strings `(N, 5)` (or fewer classes), the best first, and their `scores`.
        serving_bytes: Whether the SavedModel has a second signature `serving_bytes`, from `image_bytes`,
            strings `(N,)` that are JPEG, PNG, BMP or GIF files, to the same outputs. Images are resized to
            the model's size, bilinearly with antialiasing.
        image_size: Rows and columns that the files are resized to, if the model takes any.
        preprocessing: What makes the model's inputs of the resized images, float32 pixels of 0..255
            `(N, rows, columns, 3)`; TensorFlow operations or Keras layers. `None` if the model takes these.
        warmup: Sizes of batches that TensorFlow Serving runs each signature on, of blank images, before it
            takes requests: `(1,)` for example.

    Raises:
        ValueError: If an argument does not fit, the model is not built, or it holds operations that the
            format does not have.
        FileExistsError: If `path` holds something else.
        ImportError: If a package is missing.
        OSError: If the files cannot be written.

    Example:

    >>> keras_das.export(model, "serving/1", labels=["cat", "dog"], serving_bytes=True, warmup=(1,))
    >>> served = tf.saved_model.load("serving/1")
    >>> served.serve(images)["labels"]
    >>> served.serving_bytes(tf.constant([open("cat.jpg", "rb").read()]))["labels"]

    >>> keras_das.export(model, "model.onnx", format="onnx")
    >>> onnxruntime.InferenceSession("model.onnx").run(None, {"image": images})

    Reference:
        - [DeformConv](https://onnx.ai/onnx/operators/onnx__DeformConv.html)
        - [SavedModel warm-up](https://www.tensorflow.org/tfx/serving/saved_model_warmup)
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}. Received: format={format!r}")
    check_keras_3("model", model)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a Keras model that has been built. Received: model={model!r}")
    serving = Serving(labels, serving_bytes, image_size, preprocessing, warmup)
    if format != "saved_model" and not serving.is_plain():
        raise ValueError(f'`labels`, `serving_bytes` and `warmup` go with "saved_model". Received: {format=}')
    if format != "saved_model" and keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"`format` {format!r} needs Keras on TensorFlow. Received: {keras.backend.backend()}"
        )
    target = Path(path)
    _check_replaceable(target, format)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        written = Path(scratch) / f"new{_SUFFIXES.get(format, '')}"
        if format == "saved_model":
            saved_model.write(model, written, verbose, serving)
        else:
            {"onnx": onnx, "litert": litert, "openvino": openvino}[format].write(model, written, verbose)
        _put_in_place(written, target)


def _put_in_place(written: Path, target: Path) -> None:
    """Moves an export to where it belongs. A folder that it replaces is removed last, or put back."""
    if not target.is_dir():
        os.replace(written, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    try:
        os.replace(target, aside / target.name)
        os.replace(written, target)
    except BaseException as error:
        _put_back(aside / target.name, target, error)
        raise
    shutil.rmtree(aside)


def _put_back(old: Path, target: Path, error: BaseException) -> None:
    """Undoes the first move of `_put_in_place`, or says where the old export is."""
    try:
        if old.exists():
            os.replace(old, target)
        old.parent.rmdir()
    except OSError:
        error.add_note(f"What was at {target} is at {old}.")


def _check_replaceable(target: Path, format: str) -> None:
    if format in _SUFFIXES:
        if target.suffix != _SUFFIXES[format]:
            raise ValueError(f"`path` must end in {_SUFFIXES[format]!r}. Received: path={str(target)!r}")
        if not target.exists() or target.is_file():
            return
    elif not target.exists() or (target / _MEMBERS[format]).is_file():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    what = {"saved_model": "a SavedModel", "openvino": "OpenVINO's files"}.get(format, "a file")
    raise FileExistsError(
        f"`path` must be free, or hold {what}, which is then replaced. Received: path={str(target)!r}"
    )
