"""Fixtures for the tests of the kernel libraries."""

import pytest

from keras_das.kernels import library
from tests.kernels.stand_in import make_nvcc, make_target


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "sources")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "libraries"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder without a prebuilt library."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(library.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(library, "_PREBUILT", tmp_path / "prebuilt")
    return folder


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """The fake nvcc. CUDA_HOME refers to its folder."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return make_nvcc(tmp_path / "cuda")
