"""Tests of libraries with CUDA kernels, built with a fake nvcc, and of the search for nvcc."""

import ctypes
import importlib.util
import json
import re

import pytest

from keras_das import cli
from keras_das.kernels import builder, compilers, library
from tests.kernels.stand_in import CUDA_UNIT, build, forge, make_nvcc, needs_compiler


def test_cuda_kernels_do_not_change_the_key(target):
    assert target.for_gpus(("sm_90",)).key == target.key


@needs_compiler
def test_cuda_units_go_to_nvcc(target, root, nvcc):
    file, lines = build(target.for_gpus(("sm_80", "compute_90")), root)
    assert ctypes.CDLL(str(file)).on_gpu() == 7
    assert ctypes.CDLL(str(file)).answer() == 42
    assert f"CUDA kernels for sm_80, compute_90 with {nvcc}" in lines
    (call,) = (nvcc.parents[1] / "calls").read_text().splitlines()
    assert CUDA_UNIT in call
    assert "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=compute_90" in call
    assert call.count("-I") == 1  # our sources, but no framework


def test_launchers_and_flags_before_the_compiler(target, nvcc, monkeypatch):
    for words, host in {"ccache g++ -m64": "g++", "clang++ -m64": "clang++"}.items():
        command = builder._nvcc_command(target, words.split(), compilers.find_nvcc())
        assert f"-ccbin={host}" in command
        assert "-Xcompiler=-m64" in command


@needs_compiler
def test_library_is_built_again_with_cuda_kernels_and_back(target, root, nvcc):
    def on_gpu(file):
        return json.loads((file.parent / library.RECORD).read_text())["cuda"]

    cuda = target.for_gpus(("sm_90",))
    file, _ = build(target, root)
    assert on_gpu(file) == []
    assert library.find_in(root, cuda) is None
    for architectures in (("sm_90",), ("sm_80", "sm_90")):
        cuda = target.for_gpus(architectures)
        assert build(cuda, root)[0] == file
        assert on_gpu(file) == list(architectures)
        assert library.find_in(root, cuda) == library.find_in(root, target) == file
    _, lines = build(target, root)
    assert len(lines) == 1
    assert on_gpu(file) == ["sm_80", "sm_90"]
    build(target, root, force=True)
    assert on_gpu(file) == []
    assert [path.name for path in root.iterdir()] == [file.parent.name]


@needs_compiler
def test_library_that_lacks_a_cuda_runtime_is_not_left_behind(target, root, nvcc):
    (target.sources / CUDA_UNIT).write_text(
        'extern "C" int cudaLaunchKernel(); extern "C" int on_gpu() { return cudaLaunchKernel(); }\n'
    )
    with pytest.raises(builder.BuildError, match=r"lacks a CUDA runtime of its own \(cudaLaunchKernel\)"):
        build(target.for_gpus(("sm_90",)), root)
    assert list(root.iterdir()) == []


def test_cuda_library_fits_what_asks_for_none_but_not_for_others(cache, target):
    cuda = target.for_gpus(("sm_90",))
    file = forge(cuda, cache)
    assert library.find(target) == library.find(cuda) == file
    with pytest.raises(library.LibraryUnavailable, match="is not built"):
        library.find(target.for_gpus(("sm_80",)))


@pytest.mark.parametrize(
    ("asked", "here", "chosen"),
    [
        (None, (), ("sm_75", "sm_80", "sm_90", "compute_90")),  # the supported common architectures
        (None, ("sm_80",), ("sm_80",)),
        ("sm_75,compute_80", ("sm_90",), ("sm_75", "compute_80")),
    ],
)
def test_architectures(nvcc, monkeypatch, asked, here, chosen):
    monkeypatch.setattr(compilers, "_of_this_machine", lambda: here)
    assert compilers.architectures(compilers.find_nvcc(), asked) == chosen


def test_architectures_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compilers._of_this_machine() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 9.0\necho 12.0\necho 9.0\n")
    program.chmod(0o755)
    assert compilers._of_this_machine() == ("sm_90", "sm_120")
    program.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert compilers._of_this_machine() == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cuda", "--arch", "sm_70"],
            "`--arch` must name architectures.*sm_75, sm_80, sm_90. Received: sm_70",
        ),
        (["--cuda", "--arch", "fast"], "Received: fast"),
    ],
)
def test_unknown_architecture(nvcc, cache, capsys, arguments, message):
    assert cli.main(["build", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not cache.exists()


def test_arch_without_cuda(capsys):
    with pytest.raises(SystemExit):
        cli.main(["build", "--arch", "sm_90"])
    assert "--arch requires --cuda" in capsys.readouterr().err


def test_without_nvcc_one_line_and_status_1(monkeypatch, cache, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["build", "--framework", "jax", "--cuda"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("keras-das: no CUDA compiler: nvcc is not on the PATH")


def test_nvcc_of_the_package_index(monkeypatch, tmp_path):
    program = make_nvcc(tmp_path / "nvidia" / "cu13")
    packages = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(compilers.shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages)
    assert compilers.find_nvcc().command == str(program)
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(compilers.NoCompiler, match=r"no CUDA runtime: libcudart_static\.a is in none of"):
        compilers.find_nvcc()
    program.unlink()
    with pytest.raises(compilers.NoCompiler, match="nvidia-cuda-nvcc"):
        compilers.find_nvcc()


def test_cuda_home_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(compilers.NoCompiler, match=f"CUDA_HOME names {tmp_path}, which has no bin/nvcc"):
        compilers.find_nvcc()
