"""`export`: models as files that run without Keras and without this package."""

import os
import tempfile
from pathlib import Path

import keras

from keras_das.ops import native

FORMATS = ("saved_model",)


def export(
    model: keras.Model, path: str | os.PathLike, format: str = "saved_model", verbose: bool = False
) -> None:
    """Writes a model for serving.

    The SavedModel holds standard TensorFlow operations only, which is checked, so TensorFlow Serving loads
    it with nothing added. It is written beside `path` and moved there when it is complete: if anything goes
    wrong, what stood at `path` still does.

    Args:
        model: A built Keras model.
        path: The folder to write. A SavedModel that stands there is replaced; any other file or folder with
            content is an error.
        format: `"saved_model"`.
        verbose: Whether Keras prints the signatures.

    Raises:
        ValueError: If `format` is unknown, the model is not built, or the export holds operations that only
            this package provides.
        FileExistsError: If `path` holds something that is not a SavedModel.
        OSError: If the files cannot be written.

    Example:

    >>> keras_das.export(model, "serving/1")
    >>> served = tf.saved_model.load("serving/1")
    >>> served.serve(images)
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}. Received: format={format!r}")
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a Keras model that has been built. Received: model={model!r}")
    target = Path(path)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        written = Path(scratch) / "new"
        with native.reference_only():
            model.export(str(written), format="tf_saved_model", verbose=verbose)
        _check_operations(written)
        if target.exists():
            target.rename(Path(scratch) / "old")
        written.rename(target)


def custom_operations(path: str | os.PathLike) -> list[str]:
    """Names the operations in a SavedModel that TensorFlow itself does not have.

    Args:
        path: The folder of a SavedModel.

    Returns:
        The names, sorted. Empty for a model that any TensorFlow can serve.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    proto = saved_model_pb2.SavedModel.FromString((Path(path) / "saved_model.pb").read_bytes())
    nodes = []
    for meta_graph in proto.meta_graphs:
        nodes.extend(meta_graph.graph_def.node)
        for function in meta_graph.graph_def.library.function:
            nodes.extend(function.node_def)
    # TensorFlow keeps names with a namespace for operations from outside.
    return sorted({node.op for node in nodes if ">" in node.op})


def _check_operations(path: Path) -> None:
    custom = custom_operations(path)
    if custom:
        raise ValueError(
            f"The export holds operations that TensorFlow Serving does not have: {', '.join(custom)}. "
            "`model` must be built of layers with standard operations only."
        )


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target / "saved_model.pb").is_file():
        return
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
        return
    raise FileExistsError(
        f"`path` must be free, or hold a SavedModel, which is then replaced. Received: path={str(target)!r}"
    )
