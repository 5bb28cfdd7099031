"""Tests of `keras_das.export`: standard operations only, outputs without Keras, no data loss on errors."""

import errno
import itertools
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das.exporters import litert, openvino, saved_model
from keras_das.exporters.saved_model import custom_operations
from tests.models.backbones import randomize

# Runs where neither package can be imported, as on a server.
SERVE = textwrap.dedent(
    """
    import sys

    for name in ("keras", "keras_das"):
        sys.modules[name] = None  # from here on, importing it is an ImportError
    import numpy as np
    import tensorflow as tf

    images, *folders = sys.argv[1:]
    for folder in folders:
        model = tf.saved_model.load(folder)
        serve = model.signatures["serving_default"]
        (found,) = serve(tf.constant(np.load(images))).values()
        np.save(folder + ".npy", found.numpy())
    assert sys.modules["keras"] is None and sys.modules["keras_das"] is None
    """
)


@pytest.fixture(scope="module")
def model():
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(8, 3, strides=2, padding="same"),
            # With one tap, TensorFlow traces the layer faster.
            keras_das.DASLayer(identity_init=True, kernel_size=1),
            keras_das.DeformableConv2D(6, (2, 1), offset_initializer="random_normal"),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    randomize(model, np.random.default_rng(2))
    return model


@pytest.fixture(scope="module")
def small():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


@pytest.fixture
def images(rng):
    return rng.normal(size=(3, 17, 14, 3)).astype("float32")


def test_serves_without_keras(model, images, tmp_path):
    """`keras_das.export` and Keras' `model.export` both work after the kernels have run."""
    expected = model.predict(images, verbose=0)
    folders = [tmp_path / "of_keras_das", tmp_path / "of_keras"]
    keras_das.export(model, folders[0])
    model.export(str(folders[1]), verbose=False)
    assert [custom_operations(folder) for folder in folders] == [[], []]
    script, inputs = tmp_path / "serve.py", tmp_path / "inputs.npy"
    script.write_text(SERVE)
    np.save(inputs, images)
    subprocess.run([sys.executable, script, inputs, *folders], check=True, timeout=300)
    for folder in folders:
        np.testing.assert_allclose(np.load(f"{folder}.npy"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_trained_with_jit_exports_too(images, tmp_path):
    # A norm over the images' three channels would amplify XLA's rounding errors where their values are nearly
    # equal.
    layers = [keras.layers.Conv2D(16, 3, padding="same"), keras_das.DASLayer()]
    model = keras.Sequential([keras.Input((None, None, 3)), *layers])
    model.compile("sgd", "mse", jit_compile=True)
    model.fit(images, np.zeros((*images.shape[:3], 16)), verbose=0)
    keras_das.export(model, tmp_path / "exported")
    loaded = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(
        loaded.serve(images).numpy(), model.predict(images, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_a_custom_operation_would_be_seen(tmp_path):
    """Verifies that the check for custom operations detects one."""
    from tensorflow.core.protobuf import saved_model_pb2

    proto = saved_model_pb2.SavedModel()
    function = proto.meta_graphs.add().graph_def.library.function.add()
    function.node_def.add().op = "MatMul"
    function.node_def.add().op = "KerasDas>DeformableConv2D"
    (tmp_path / "saved_model.pb").write_bytes(proto.SerializeToString())
    assert custom_operations(tmp_path) == ["KerasDas>DeformableConv2D"]


def test_export_refuses_custom_operations(small, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "custom_operations", lambda path: ["KerasDas>X"])
    with pytest.raises(ValueError, match="KerasDas>X"):
        keras_das.export(small, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_replaces_a_saved_model(small, tmp_path):
    keras_das.export(small, tmp_path / "exported")
    (tmp_path / "exported" / "left_over").write_text("from the first export")
    keras_das.export(small, tmp_path / "exported")
    assert [entry.name for entry in tmp_path.iterdir()] == ["exported"]
    assert not (tmp_path / "exported" / "left_over").exists()


def test_keeps_the_old_one_when_the_disk_is_full(small, tmp_path, monkeypatch):
    folder = tmp_path / "exported"
    keras_das.export(small, folder)
    before = (folder / "saved_model.pb").read_bytes()

    def disk_full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(small, "export", disk_full)
    with pytest.raises(OSError, match="No space left"):
        keras_das.export(small, folder)
    assert (folder / "saved_model.pb").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["exported"]


def test_keeps_what_is_not_a_saved_model(small, tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="exists and is not a SavedModel"):
        keras_das.export(small, tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        keras_das.export(small, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def writer(content, error=None):
    """A fake for functions that write a file."""

    def write(model, path, *arguments):
        path.write_text(content)
        if error:
            raise error

    return write


def test_replaces_a_file_whole_or_not_at_all(small, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    for content in ("first", "second"):
        monkeypatch.setattr(litert, "write", writer(content))
        keras_das.export(small, path, format="litert")
        assert path.read_text() == content
    monkeypatch.setattr(litert, "write", writer("half", OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        keras_das.export(small, path, format="litert")
    assert path.read_text() == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.tflite"]


def test_paths_of_other_formats(small, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in '\.onnx'. Received: path=.*model\.pb"):
        keras_das.export(small, tmp_path / "model.pb", format="onnx")
    for name, format in (("model.onnx", "onnx"), ("model.tflite", "litert")):
        with pytest.raises(ValueError, match=f"`format='{format}'`. Received: path=.*{name}"):
            keras_das.export(small, tmp_path / name)
        with pytest.raises(ValueError, match=f"`path` is a folder .*'openvino'.*`format='{format}'`"):
            keras_das.export(small, tmp_path / name, format="openvino")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.tflite").mkdir()
    (tmp_path / "model.tflite" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="exists and is not a file"):
        keras_das.export(small, tmp_path / "model.tflite", format="litert")
    keras_das.export(small, tmp_path / "saved")
    with pytest.raises(FileExistsError, match="exists and is not an OpenVINO model"):
        keras_das.export(small, tmp_path / "saved", format="openvino")


def test_bad_arguments(model, tmp_path):
    with pytest.raises(ValueError, match=r"`format` must be one of .*Received: format='pb'"):
        keras_das.export(model, tmp_path / "x", format="pb")
    with pytest.raises(ValueError, match="`model` must be a Keras model"):
        keras_das.export("model.keras", tmp_path / "x")
    with pytest.raises(ValueError, match="`model` must be a Keras model that has been built"):
        keras_das.export(keras.Sequential([keras_das.DASLayer()]), tmp_path / "x")


FOLDERS = {"saved_model": "saved_model.pb", "openvino": "model.xml"}


def folder_writer(content):
    """A fake for functions that write a folder."""

    def write(model, path, *arguments):
        path.mkdir()
        for name in FOLDERS.values():
            (path / name).write_text(content)

    return write


@pytest.fixture
def stand_in_writers(monkeypatch):
    for module in (saved_model, openvino):
        monkeypatch.setattr(module, "write", folder_writer("new"))


def failing_replace(fails):
    """A fake `os.replace` that fails if `fails` returns true for the number of the call, counted from 1."""
    replace, calls = os.replace, itertools.count(1)

    def fail(source, target):
        if fails(next(calls)):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    return fail


@pytest.mark.parametrize("format", FOLDERS)
@pytest.mark.parametrize("first_to_fail", [1, 2])
@pytest.mark.parametrize("content", ["old", None])
def test_a_failing_rename_leaves_what_stood_there(
    format, first_to_fail, content, small, tmp_path, stand_in_writers, monkeypatch
):
    """An existing export, or an empty folder, is restored if the new export cannot be moved into place."""
    folder = tmp_path / "exported"
    folder.mkdir()
    if content:
        (folder / FOLDERS[format]).write_text(content)
    monkeypatch.setattr(os, "replace", failing_replace(lambda number: number == first_to_fail))
    with pytest.raises(PermissionError):
        keras_das.export(small, folder, format=format)
    assert [entry.name for entry in tmp_path.iterdir()] == ["exported"]
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == (
        [(FOLDERS[format], content)] if content else []
    )


def test_an_export_that_cannot_be_put_back_is_kept(small, tmp_path, stand_in_writers, monkeypatch):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "saved_model.pb").write_text("old")
    monkeypatch.setattr(os, "replace", failing_replace(lambda number: number > 1))
    with pytest.raises(PermissionError) as caught:
        keras_das.export(small, folder)
    (kept,) = tmp_path.glob(".exported-old-*/exported")
    assert caught.value.__notes__ == [f"What was at {folder} is at {kept}."]
    assert (kept / "saved_model.pb").read_text() == "old"


def test_a_failing_rename_of_a_file(small, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    path.write_text("old")
    monkeypatch.setattr(litert, "write", writer("new"))
    monkeypatch.setattr(os, "replace", failing_replace(lambda number: True))
    with pytest.raises(PermissionError):
        keras_das.export(small, path, format="litert")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("model.tflite", "old")]


@pytest.mark.parametrize("name", ["exported", "model.tflite"])
def test_an_empty_folder_is_replaced_by_a_complete_export_only(name, small, tmp_path, monkeypatch):
    path, module = tmp_path / name, litert if name.endswith("tflite") else saved_model
    format = "litert" if module is litert else "saved_model"
    path.mkdir()
    monkeypatch.setattr(module, "write", writer("half", OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        keras_das.export(small, path, format=format)
    assert path.is_dir()
    monkeypatch.setattr(module, "write", writer("new") if module is litert else folder_writer("new"))
    keras_das.export(small, path, format=format)
    assert path.is_file() if module is litert else (path / "saved_model.pb").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
