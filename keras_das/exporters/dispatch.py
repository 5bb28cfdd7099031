"""`export`: validates the arguments, calls the writer of the format and moves its files into place."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_das.exporters import litert, onnx, openvino, saved_model
from keras_das.exporters.saved_model import Serving
from keras_das.models.graph import check_built

FORMATS = ("saved_model", "onnx", "litert", "openvino")
_SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}  # of formats that are a file
_MEMBERS = {"saved_model": "saved_model.pb", "openvino": "model.xml"}  # of formats that are a folder


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
    """Exports a model for serving.

    Exported models run without this package and accept batches of any size (and images of any size, if the
    model does):

    - `"saved_model"`: a folder for TensorFlow Serving. An error is raised if it contains operations that
      TensorFlow does not have. XLA and LiteRT do not support its `CropAndResize`: for these, use
      `model.export`.
    - `"onnx"`: an `.onnx` file of opset 19, with one `DeformConv` per deformable convolution. Borders are the
      same as in this package; the result for a NaN in an offset is unspecified. bfloat16 becomes float32.
      Inputs and outputs are in Keras' order. Requires the extra `export`, and Keras on TensorFlow.
    - `"litert"`: a `.tflite` file of built-in LiteRT operations, which computes in float32 for models of any
      precision. Requires Keras on TensorFlow.
    - `"openvino"`: a folder with `model.xml` and `model.bin`, converted from ONNX, with one
      `DeformableConvolution` per deformable convolution. Requires the extra `export`, and Keras on
      TensorFlow.

    The export is written next to `path` and moved there when it is complete. If it fails, `path` is
    unchanged. `labels`, `serving_bytes` and `warmup` require a SavedModel, Keras on TensorFlow, and a
    functional or sequential model with one input and one output.

    Args:
        model: A built Keras model.
        path: String or path. The file or folder to write; files, and only files, end in `.onnx` or `.tflite`.
            An existing export of the same format is replaced. Any other existing file, or folder that is not
            empty, is an error.
        format: String. `"saved_model"`, `"onnx"`, `"litert"` or `"openvino"`. Defaults to `"saved_model"`.
        verbose: Boolean. Whether Keras prints the signatures. Defaults to `False`.
        labels: Sequence of strings. The class names of a model with one output `(N, classes)`. The signatures
            of the SavedModel then also return `labels`, strings `(N, 5)` (or fewer classes) with the best
            first, and their `scores`. Defaults to `None`.
        serving_bytes: Boolean. Whether to add a signature `serving_bytes` to the SavedModel, from
            `image_bytes`, strings `(N,)` of encoded JPEG, PNG, BMP or GIF files, to the same outputs. Images
            are resized to the size of the model, bilinearly with antialiasing. Defaults to `False`.
        image_size: `(rows, columns)` of resized images and of warm-up requests, for a model that accepts
            any size. Defaults to `None`.
        preprocessing: Function of TensorFlow operations or Keras layers that maps the resized images, float32
            pixels of 0..255 `(N, rows, columns, 3)`, to inputs of the model. Defaults to `None`: the model
            receives these pixels.
        warmup: Sequence of integers. Batch sizes for which TensorFlow Serving runs each signature on blank
            images before it accepts requests, for example `(1,)`. Defaults to `()`.

    Raises:
        ValueError: If an argument is invalid, the model is not built, or it contains operations that the
            format does not support.
        FileExistsError: If `path` exists and must not be replaced.
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
    check_built(model)
    serving = Serving(labels, serving_bytes, image_size, preprocessing, warmup)
    if format != "saved_model" and not serving.is_plain():
        raise ValueError(
            f'`labels`, `serving_bytes` and `warmup` require format="saved_model". Received: {format=}'
        )
    if format != "saved_model" and keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"`format` {format!r} requires Keras on TensorFlow. Received: {keras.backend.backend()}"
        )
    target = Path(path)
    _check_suffix(target, format)
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
    """Moves an export to its path. A replaced folder is removed last, or restored on failure."""
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
    """Reverts the first move of `_put_in_place`, or adds the path of the previous export to the error."""
    try:
        if old.exists():
            os.replace(old, target)
        old.parent.rmdir()
    except OSError:
        error.add_note(f"What was at {target} is at {old}.")


def _check_suffix(target: Path, format: str) -> None:
    if format in _SUFFIXES:
        if target.suffix != _SUFFIXES[format]:
            raise ValueError(f"`path` must end in {_SUFFIXES[format]!r}. Received: path={str(target)!r}")
        return
    for other, suffix in _SUFFIXES.items():
        if target.suffix == suffix:
            raise ValueError(
                f"`path` is a folder if the format is {format!r}. For a file, set `format={other!r}`. "
                f"Received: path={str(target)!r}"
            )


def _check_replaceable(target: Path, format: str) -> None:
    if format in _SUFFIXES:
        if not target.exists() or target.is_file():
            return
    elif not target.exists() or (target / _MEMBERS[format]).is_file():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    what = {"saved_model": "a SavedModel", "openvino": "an OpenVINO model"}.get(format, "a file")
    raise FileExistsError(
        f"`path` already exists and is not {what}, so it is not overwritten. Received: path={str(target)!r}"
    )
