"""Tests of finding and loading a library, and of missing and damaged libraries."""

import os
import pathlib
import sys
import threading

import pytest
import tensorflow as tf

from keras_das.kernels import library, targets
from tests.kernels.stand_in import (
    change_a_byte,
    forge,
    forget_ingredients,
    garble_record,
    put_another_version_s,
    remove_file,
    target_of,
    truncate,
)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv(library.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert library.cache_folder() == pathlib.Path("/home/somebody/.cache/keras_das")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert library.cache_folder() == pathlib.Path("/home/somebody/.cache/keras_das")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert library.cache_folder() == pathlib.Path("/caches/keras_das")
    monkeypatch.setenv(library.CACHE_VARIABLE, "~/mine")
    assert library.cache_folder() == pathlib.Path("/home/somebody/mine")


def test_library_in_the_cache_comes_before_the_prebuilt_one(cache, target):
    """The user has built it, for example with CUDA kernels, which the prebuilt library lacks."""
    prebuilt = forge(target, library._PREBUILT)
    assert library.find(target) == prebuilt
    cached = forge(target.for_gpus(("sm_90",)), cache)
    assert library.find(target) == cached


@pytest.mark.parametrize("damage", ["truncated", "another version"])
def test_prebuilt_library_replaces_an_unusable_one_in_the_cache(cache, target, damage):
    if damage == "truncated":
        os.truncate(forge(target, cache), 10)
    else:
        forge(target_of(target.sources, version="1.2.2"), cache)
    prebuilt = forge(target, library._PREBUILT)
    assert library.find(target) == prebuilt


DAMAGES = {
    truncate: "is damaged",
    change_a_byte: "is damaged",
    remove_file: "cannot be read",
    garble_record: "unreadable library.json",
    forget_ingredients: "unreadable library.json",
    put_another_version_s: "was built for jax 0.9 from other sources or with other flags than JAX 1.2.3",
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.items(), ids=lambda p: getattr(p, "__name__", ""))
def test_damage_is_seen_before_the_library_is_opened(cache, target, damage, words, caplog):
    file = forge(target, cache)
    damage(file)

    def load(file):
        raise AssertionError(f"{file} was opened")

    slot = library.Slot(lambda: target, load)
    for _ in range(2):
        with pytest.raises(library.LibraryUnavailable) as caught:
            slot.get()
        assert words in str(caught.value)
        assert 'run "keras-das build"' in str(caught.value)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.name == "keras_das"
    assert "\n" not in record.getMessage()


def test_file_that_is_no_library(cache, target, caplog):
    forge(target, cache)
    with pytest.raises(library.LibraryUnavailable, match="cannot be loaded"):
        library.Slot(lambda: target, library.load_jax).get()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_second_library_in_a_process_is_refused(cache, monkeypatch, tmp_path):
    """TensorFlow would load the second library, but all calls would fail."""
    loaded = []
    monkeypatch.setattr(tf, "load_op_library", loaded.append)
    monkeypatch.setattr(tf, library._LOADED, str(tmp_path / "one"), raising=False)
    library.load_tensorflow(tmp_path / "one")
    with pytest.raises(library.LibraryUnavailable, match="already loaded another"):
        library.load_tensorflow(tmp_path / "another")
    assert loaded == [str(tmp_path / "one")]


def test_unreadable_cache_folder(monkeypatch, tmp_path, target, caplog, cache):
    (tmp_path / "file").touch()
    monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.raises(library.LibraryUnavailable, match=r"cannot be read.*KERAS_DAS_CACHE"):
        library.Slot(lambda: target, library.load_jax).get()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_library_that_is_not_built_is_no_reason_to_warn(cache, target, caplog):
    caplog.set_level("INFO")
    with pytest.raises(library.LibraryUnavailable, match='is not built: run "keras-das build"'):
        library.Slot(lambda: target, library.load_jax).get()
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_missing_framework_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(library.LibraryUnavailable, match="JAX is not installed"):
        targets.target("jax")


def test_other_systems_are_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(library.LibraryUnavailable, match="Linux only"):
        targets.target("tensorflow")


def test_many_threads_load_once(cache, target):
    file = forge(target, cache)
    loaded, got = [], []
    start = threading.Barrier(8)

    def load(file):
        loaded.append(file)
        sum(range(1_000_000))  # takes long enough for the other threads to arrive
        return object()

    slot = library.Slot(lambda: target, load)

    def use():
        start.wait()
        got.append(slot.get())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [file]
    assert slot.path == file
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
