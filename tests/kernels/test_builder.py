"""Tests of `keras-das build`: building and removing libraries, with the fake library of `stand_in.py`."""

import ctypes
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from keras_das import cli
from keras_das.kernels import builder, library
from tests.kernels.stand_in import build, forge, needs_compiler, target_of, wrap_compiler

REPOSITORY = pathlib.Path(__file__).parents[2]


@needs_compiler
def test_build_gives_a_library_that_works(target, root):
    file, lines = build(target, root)
    assert ctypes.CDLL(str(file)).answer() == 42
    assert {path.name for path in root.iterdir()} == {target.folder_name}
    assert {path.name for path in file.parent.iterdir()} == {library.FILE, library.RECORD}
    progress = [line for line in lines if line.startswith("[")]
    assert [line.split()[0] for line in progress] == ["[1/2]", "[2/2]"]
    assert {line.split("] ")[1].rpartition(":")[0] for line in progress} == {"answer.cc", "half.cc (of it)"}
    assert all(line.endswith(" s") for line in progress)
    assert str(file) in lines[-1]


@needs_compiler
def test_library_says_what_it_was_built_as(target, root):
    file, _ = build(target, root)
    record = json.loads((file.parent / library.RECORD).read_text())
    assert record["ingredients"] == target.ingredients
    assert record["cuda"] == []
    assert record["compiler"]


@needs_compiler
def test_second_build_compiles_nothing_unless_forced(target, root):
    file, _ = build(target, root)
    first = file.stat().st_ino
    again, lines = build(target, root)
    assert (again, file.stat().st_ino) == (file, first)
    assert lines == [f"The kernel library for JAX 1.2.3 is built: {file}"]
    _, lines = build(target, root, force=True)
    assert len(lines) > 1
    assert file.stat().st_ino != first
    assert {path.name for path in root.iterdir()} == {target.folder_name}


@needs_compiler
def test_damaged_library_is_built_anew(target, root):
    file, _ = build(target, root)
    os.truncate(file, 100)
    build(target, root)
    assert library.find_in(root, target) == file


@needs_compiler
@pytest.mark.parametrize("jobs", [1, 3])
def test_units_start_in_order(target, root, jobs, tmp_path, monkeypatch):
    log = wrap_compiler(tmp_path, monkeypatch)
    build(target, root, jobs=jobs)
    compiled = [line for line in log.read_text().splitlines() if " -c " in line]
    assert len(compiled) == 2
    if jobs == 1:
        assert ["answer.cc" in compiled[0], "half.cc" in compiled[1]] == [True, True]


@needs_compiler
@pytest.mark.parametrize("earlier", [False, True])
def test_compile_error_shows_the_compiler_s_words_and_leaves_nothing(target, root, earlier):
    if earlier:
        build(target, root)
    before = sorted(path.name for path in root.rglob("*")) if earlier else []
    (target.sources / "half.cc").write_text("int half_of_it() { return this is wrong; }\n")
    with pytest.raises(builder.BuildError) as caught:
        build(target_of(target.sources), root)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("compiling half.cc (of it) failed (exit status 1)")
    assert any("half.cc:1" in line and "error" in line for line in lines[1:])
    assert sorted(path.name for path in root.rglob("*")) == before


@needs_compiler
def test_library_that_does_not_load_is_not_left_behind(target, root):
    (target.sources / "half.cc").write_text("int another() { return 0; }\n")
    with pytest.raises(builder.BuildError, match=r"(?s)loading the library failed.*half_of_it"):
        build(target_of(target.sources), root)
    assert list(root.iterdir()) == []


@needs_compiler
def test_sources_that_change_meanwhile_fail_the_build(target, root, tmp_path, monkeypatch):
    wrap_compiler(tmp_path, monkeypatch, f"echo >> {target.sources}/answer.h")
    with pytest.raises(builder.BuildError, match="changed while they were compiled"):
        build(target, root)
    assert list(root.iterdir()) == []


@needs_compiler
def test_leftovers_of_a_killed_build_are_removed(target, root):
    (root / ".unfinished-abc").mkdir(parents=True)
    (root / "lock").touch()
    build(target, root)
    assert {path.name for path in root.iterdir()} == {target.folder_name}


def test_without_a_compiler_one_line_and_status_1(monkeypatch, cache, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main(["build"]) == 1
    out, error = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[:2] for line in error.splitlines()] == [["keras-das", " no C++ compiler"]]
    assert not cache.exists()


def test_named_compiler_that_is_not_there(monkeypatch, cache, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    assert cli.main(["build"]) == 1
    assert "CXX names no-such-compiler" in capsys.readouterr().err


def test_unwritable_folder_fails_the_build(monkeypatch, tmp_path, capsys, cache):
    monkeypatch.setattr(builder, "find_compiler", lambda: ["g++"])
    (tmp_path / "file").touch()
    assert cli.main(["build", "--output", str(tmp_path / "file" / "folder")]) == 3
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_no_kernels_for_a_backend(monkeypatch, capsys):
    monkeypatch.setattr(cli.keras.backend, "backend", lambda: "torch")
    assert cli.main(["build"]) == 1
    assert "no kernels for Keras on torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "backend", "built"),
    [
        ([], "tensorflow", ["tensorflow"]),
        ([], "jax", ["jax"]),
        (["--framework", "jax"], "tensorflow", ["jax"]),
        (["--framework", "all"], "torch", ["tensorflow", "jax"]),
    ],
)
def test_which_frameworks_are_built_for(monkeypatch, arguments, backend, built):
    calls = []
    monkeypatch.setattr(cli.keras.backend, "backend", lambda: backend)
    monkeypatch.setattr(builder, "build", lambda target, *rest: calls.append((target.framework, *rest)))
    assert cli.main(["build", "--force", "--jobs", "3", "--output", "there", *arguments]) == 0
    assert [call[0] for call in calls] == built
    assert all(call[1:4] == (pathlib.Path("there"), True, 3) for call in calls)


def test_clean_removes_libraries_and_nothing_else(cache, target, capsys):
    file = forge(target, cache)
    (cache / "mine").mkdir()
    (cache / ".unfinished-abc").mkdir()
    assert cli.main(["build", "--clean"]) == 0
    assert [path.name for path in cache.iterdir()] == ["mine"]
    assert capsys.readouterr().out == f"Removed {file.parent}\n"
    (cache / "mine").rmdir()
    assert cli.main(["build", "--clean"]) == 0
    assert not cache.exists()
    assert cli.main(["build", "--clean"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Nothing to remove: no kernel library in {cache}",
        f"Nothing to remove: there is no {cache}",
    ]


@pytest.mark.slow
@needs_compiler
def test_two_processes_at_once_build_once(target, root, tmp_path, monkeypatch):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    log = wrap_compiler(tmp_path, monkeypatch, f'case "$*" in *half.cc*) read line < {gate};; esac')
    command = [sys.executable, "-m", "tests.kernels.stand_in", str(target.sources), str(root)]
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}  # the fastest to import
    start = functools.partial(
        subprocess.Popen, command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    # Data in a pipe is lost when the last process closes it, so the pipe remains open until the end.
    with start() as first, start() as second, open(os.open(gate, os.O_RDWR), "w") as opened:
        try:  # the first compiler waits at the pipe, the second process for the lock
            line = first.stdout.readline()
            builds, waits = (second, first) if "Waiting for" in line else (first, second)
            assert "Waiting for another process" in (line if waits is first else waits.stdout.readline())
            print("go", file=opened, flush=True)
            built, found = builds.communicate(timeout=120)[0], waits.communicate(timeout=120)[0]
        finally:
            first.kill()
            second.kill()
    assert builds.returncode == waits.returncode == 0
    assert "Built in" in built
    assert found.startswith("Another process has built")
    assert sum(" -c " in line for line in log.read_text().splitlines()) == 2


def test_a_folder_that_another_process_removes_is_created_again(monkeypatch, root):
    """`build --clean` can remove the folder while `build` waits for its lock."""
    is_file = builder._is_file

    def removed(path, descriptor):
        monkeypatch.setattr(builder, "_is_file", is_file)
        shutil.rmtree(path.parent)
        return is_file(path, descriptor)

    monkeypatch.setattr(builder, "_is_file", removed)
    with builder._locked(root, print):
        assert (root / "lock").exists()
