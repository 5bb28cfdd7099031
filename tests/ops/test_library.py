"""Building, finding and loading the kernel library, and what happens when any of it cannot be done.

What is built here is a stand-in of two small units; `stand_in.py` has it.
"""

import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import textwrap
import threading

import pytest
import tensorflow as tf

from keras_das import cli
from keras_das.ops import builder, compilers, library
from tests import processes
from tests.ops.stand_in import forge, make_target, target_of

REPOSITORY = pathlib.Path(__file__).parents[2]


def has_compiler():
    try:
        builder.find_compiler()
    except builder.NoCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler on this machine")


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "sources")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "libraries"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing prebuilt."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(library.CACHE_VARIABLE, str(folder))
    monkeypatch.setattr(library, "_PREBUILT", tmp_path / "prebuilt")
    return folder


def build(target, root, **options):
    """Builds the stand-in; returns its file and the lines of progress."""
    lines = []
    return builder.build(target, root, report=lines.append, **options), lines


# The key


def retold(target, **changes):
    return target_of(target.sources, **changes).key


@pytest.mark.parametrize(
    "changes",
    [
        {"framework": "tensorflow"},
        {"version": "1.2.4"},
        {"abi": "0"},
        {"platform": "Linux aarch64"},
        {"flags": ("-std=c++17", "-O2", "-fPIC")},
        {"link_flags": ("-shared",)},
        {"units": (library.Unit("answer.cc"), library.Unit("half.cc", ("-DHALF=20",)))},
        {"units": (library.Unit("answer.cc"),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_key_changes_with(target, changes):
    assert retold(target) == target.key
    assert retold(target, **changes) != target.key


@pytest.mark.parametrize("name", ["answer.h", "half.cc"])
def test_key_changes_with_the_text_of(target, name):
    before = target.key
    (target.sources / name).write_text((target.sources / name).read_text() + "\n")
    assert retold(target) != before


def test_key_does_not_depend_on_where_things_are_installed(target, tmp_path):
    flags, links = (*target.flags, "-I/here/include"), (*target.link_flags, "-L/here")
    elsewhere = make_target(tmp_path / "elsewhere", flags=flags, link_flags=links)
    assert elsewhere.key == target.key


@pytest.mark.parametrize("framework", library.FRAMEWORKS)
def test_units_exist_and_each_is_compiled_once(framework):
    target = library.target(framework)
    assert len(set(target.units)) == len({str(unit) for unit in target.units}) == len(target.units)
    assert all((target.sources / unit.source).is_file() for unit in target.units)
    assert ("xla_ops.cc" in {unit.source for unit in target.units}) == (framework == "tensorflow")


# Building


@needs_compiler
def test_build_gives_a_library_that_works(target, root):
    file, lines = build(target, root)
    assert ctypes.CDLL(str(file)).answer() == 42
    assert {path.name for path in root.iterdir()} == {target.folder_name}
    assert {path.name for path in file.parent.iterdir()} == {library.FILE, library.RECORD}
    progress = [line for line in lines if line.startswith("[")]
    assert [line.split()[0] for line in progress] == ["[1/3]", "[2/3]", "[3/3]"]
    assert {line.split("] ")[1].rpartition(":")[0] for line in progress} == {
        "answer.cc",
        "half.cc (of it)",
        "key.cc",
    }
    assert all(line.endswith(" s") for line in progress)
    assert str(file) in lines[-1]


@needs_compiler
def test_library_says_what_it_was_built_as(target, root):
    file, _ = build(target, root)
    text = ctypes.c_char * 100
    assert text.in_dll(ctypes.CDLL(str(file)), library.KEY_SYMBOL).value.decode().endswith(target.key)
    assert json.loads((file.parent / library.RECORD).read_text())["ingredients"] == target.ingredients


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
    assert library.check(file.parent, target) == file


@needs_compiler
@pytest.mark.parametrize("jobs", [1, 3])
def test_units_start_in_order(target, root, jobs, tmp_path, monkeypatch):
    log = wrap_compiler(tmp_path, monkeypatch)
    build(target, root, jobs=jobs)
    compiled = [line for line in log.read_text().splitlines() if " -c " in line]
    assert len(compiled) == 3
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


def wrap_compiler(folder, monkeypatch, *commands):
    """Puts a program in the compiler's place that notes each call, runs `commands`, and then compiles."""
    log, wrapper = folder / "calls", folder / "compiler"
    lines = ["#!/bin/sh", f'echo "$@" >> {log}', *commands, f'exec {builder.find_compiler()[0]} "$@"']
    wrapper.write_text("\n".join(lines) + "\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


@pytest.mark.slow
@needs_compiler
def test_two_processes_at_once_build_once(target, root, tmp_path, monkeypatch):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    log = wrap_compiler(tmp_path, monkeypatch, f'case "$*" in *half.cc*) read line < {gate};; esac')
    command = [sys.executable, "-m", "tests.ops.stand_in", str(target.sources), str(root)]
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}  # the quickest to import
    start = functools.partial(
        subprocess.Popen, command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    # What is written to a pipe is lost when its last user closes it: it stays open until all is done.
    with start() as first, start() as second, open(os.open(gate, os.O_RDWR), "w") as opened:
        try:  # the first compiler comes to the gate, and the second process to the lock
            line = first.stdout.readline()
            builds, waits = (second, first) if "at work" in line else (first, second)
            assert "Another process is at work" in (line if waits is first else waits.stdout.readline())
            print("go", file=opened, flush=True)
            built, found = builds.communicate(timeout=120)[0], waits.communicate(timeout=120)[0]
        finally:
            first.kill()
            second.kill()
    assert builds.returncode == waits.returncode == 0
    assert "Built in" in built
    assert found.startswith("Another process has built")
    assert sum(" -c " in line for line in log.read_text().splitlines()) == 3


# CUDA: a stand-in for nvcc, too

CUDA_UNIT = "deformable_conv2d.cu.cc"


def make_nvcc(folder):
    """A program that answers as nvcc does and has the C++ compiler do the work."""
    compiler = builder.find_compiler()[0] if has_compiler() else "none"
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            case "$1" in
              --dryrun) echo "#$ TOP={folder}/bin/.."; exit;;
              --list-gpu-code) echo sm_75; echo sm_80; echo sm_90; exit;;
              --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90; exit;;
            esac
            echo "$@" >> {folder}/calls
            while [ "$1" != -c ]; do shift; done
            exec {compiler} -fPIC -x c++ "$@"
            """
        )
    )
    nvcc.chmod(0o755)
    (folder / "lib" / "libcudart_static.a").write_text("!<arch>\n")
    return nvcc


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """The stand-in, as the variable CUDA_HOME names it."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return make_nvcc(tmp_path / "cuda")


def cuda_target(target, *architectures):
    (target.sources / CUDA_UNIT).write_text('extern "C" int on_gpu() { return 7; }\n')
    return target_of(target.sources).for_gpus(architectures or ("sm_90",))


def test_key_changes_with_the_architectures(target):
    keys = {target.key, cuda_target(target).key, cuda_target(target, "sm_80", "sm_90").key}
    assert len(keys) == 3


@needs_compiler
def test_cuda_units_go_to_nvcc(target, root, nvcc):
    file, lines = build(cuda_target(target, "sm_80", "compute_90"), root)
    assert ctypes.CDLL(str(file)).on_gpu() == 7
    assert ctypes.CDLL(str(file)).answer() == 42
    assert f"CUDA kernels for sm_80, compute_90 with {nvcc}" in lines
    (call,) = (nvcc.parents[1] / "calls").read_text().splitlines()
    assert CUDA_UNIT in call
    assert "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=compute_90" in call
    assert "-I" not in call.split(" -c ")[0]


@needs_compiler
def test_cuda_library_takes_the_place_of_the_other_and_back(target, root, nvcc):
    plain, _ = build(target, root)
    cuda, lines = build(cuda_target(target), root)
    assert f"Removed {plain.parent}, whose place it takes" in lines
    assert [path.name for path in root.iterdir()] == [cuda.parent.name]
    plain = target_of(target.sources)
    assert library.find_in(root, plain) == cuda
    again, lines = build(plain, root)
    assert again == cuda
    assert len(lines) == 1
    other, _ = build(cuda_target(target, "sm_80"), root)
    assert [path.name for path in root.iterdir()] == [other.parent.name]
    plain, _ = build(plain, root, force=True)
    assert [path.name for path in root.iterdir()] == [plain.parent.name]


@needs_compiler
def test_library_that_lacks_a_cuda_runtime_is_not_left_behind(target, root, nvcc):
    changed = cuda_target(target)
    (target.sources / CUDA_UNIT).write_text(
        'extern "C" int cudaLaunchKernel(); extern "C" int on_gpu() { return cudaLaunchKernel(); }\n'
    )
    with pytest.raises(builder.BuildError, match=r"lacks a CUDA runtime of its own \(cudaLaunchKernel\)"):
        build(dataclasses.replace(changed), root)
    assert list(root.iterdir()) == []


def test_cuda_library_comes_first_and_serves_what_asks_for_none(cache, target):
    plain = forge(target, cache)
    cuda = forge(cuda_target(target), cache)
    assert library.find(target) == cuda
    os.truncate(cuda, 10)
    assert library.find(target) == plain
    with pytest.raises(library.LibraryUnavailable, match="has 10 bytes"):
        library.find(cuda_target(target))


def test_cuda_library_of_other_sources_is_not_taken(cache, target):
    forge(cuda_target(target), cache)
    (target.sources / "half.cc").write_text("\n")
    with pytest.raises(library.LibraryUnavailable, match="is not built"):
        library.find(target_of(target.sources))


@pytest.mark.parametrize(
    ("asked", "here", "chosen"),
    [
        (None, (), ("sm_75", "sm_80", "sm_90", "compute_90")),  # of the common ones those that it knows
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
    assert "--arch is of use with --cuda only" in capsys.readouterr().err


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


# Finding


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


def test_prebuilt_library_comes_first(cache, target):
    forge(target, cache)
    prebuilt = forge(target, library._PREBUILT)
    assert library.find(target) == prebuilt


@pytest.mark.parametrize("damage", ["truncated", "another version"])
def test_cache_replaces_an_unusable_prebuilt_library(cache, target, damage):
    if damage == "truncated":
        os.truncate(forge(target, library._PREBUILT), 10)
    else:
        forge(target_of(target.sources, version="1.2.2"), library._PREBUILT)
    cached = forge(target, cache)
    assert library.find(target) == cached


def damage_nothing(file):
    pass


def truncate(file):
    os.truncate(file, 100)


def change_a_byte(file):
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)


def remove_file(file):
    file.unlink()


def garble_record(file):
    (file.parent / library.RECORD).write_text('{"key": 1')


def forget_key(file):
    record = json.loads((file.parent / library.RECORD).read_text())
    del record["key"]
    (file.parent / library.RECORD).write_text(json.dumps(record))


def put_another_version_s(file):
    """File and record are whole and another version's, but for the key in the record."""
    record = json.loads((file.parent / library.RECORD).read_text())
    content = file.read_bytes().replace(record["key"].encode(), b"0123456789abcdef")
    file.write_bytes(content)
    record["sha256"] = hashlib.sha256(content).hexdigest()
    record["ingredients"]["version"] = "0.9"
    (file.parent / library.RECORD).write_text(json.dumps(record))


DAMAGES = {
    truncate: "has 100 bytes and should have 20",
    change_a_byte: "is damaged",
    remove_file: "cannot be read",
    garble_record: "unreadable library.json",
    forget_key: "unreadable library.json",
    put_another_version_s: "was built for jax 0.9, not JAX 1.2.3 (key 0123456789abcdef and",
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
    """TensorFlow would take it, and then fail at every call."""
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
        library.target("jax")


def test_other_systems_are_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(library.LibraryUnavailable, match="Linux only"):
        library.target("tensorflow")


def test_many_threads_load_once(cache, target):
    file = forge(target, cache)
    loaded, got = [], []
    start = threading.Barrier(8)

    def load(file):
        loaded.append(file)
        sum(range(1_000_000))  # long enough for the others to come
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


# The operation, whatever the state of the library: right numbers, and as many lines as there is to say

OPERATION = """
import logging, sys
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
handler.setLevel("WARNING")
logging.getLogger("keras_das").addHandler(handler)

import numpy as np
from tests.ops.op_cases import Case, assert_as_expected, call, draw, split_upstream
from tests.ops.tf_harness import run

case = Case("", padding="same", groups=2)
tensors = draw(case, np.random.default_rng(0))
for mode in sys.argv[1:]:
    assert_as_expected(case, tensors, "float32", *run(case, tensors, mode, implementation="auto"))
print(len(warnings), "warnings:", *warnings)
try:
    call(split_upstream(tensors)[0], case, implementation="native")
    print("native: works")
except RuntimeError as error:
    print("native:", error)
"""


def run_operation(tmp_path, *modes, **environment):
    """What a process of its own prints: one line on its warnings, one on `implementation="native"`."""
    code = (
        "import pathlib\nfrom keras_das.ops import library\n"
        'library._PREBUILT = pathlib.Path("/no/such/folder")\n' + OPERATION
    )
    result = processes.python(code, *modes, folder=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("modes", [["eager"], pytest.param(["graph", "xla"], marks=pytest.mark.slow)])
def test_op_without_compiler_and_without_cache(tmp_path, modes):
    """Nothing to compile with, nothing compiled: the reference gives the oracle's numbers, without a word."""
    nothing = {"PATH": "", "CXX": "", library.CACHE_VARIABLE: str(tmp_path / "empty")}
    warnings, native = run_operation(tmp_path, *modes, **nothing)
    assert warnings == "0 warnings:"
    assert native.startswith('native: implementation="native" cannot be used: the kernel library')
    assert 'is not built: run "keras-das build"' in native
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing,
        *(
            pytest.param(damage, marks=pytest.mark.slow)
            for damage in (truncate, put_another_version_s, "folder")
        ),
    ],
)
def test_op_with_a_broken_library(tmp_path, damage):
    """`damage_nothing` leaves a file that passes every check and cannot be opened."""
    cache = tmp_path / "cache"
    if damage == "folder":
        cache.touch()
        cache = cache / "below_a_file"
    else:
        damage(forge(library.target("tensorflow"), cache))
    warnings, native = run_operation(tmp_path, "eager", "graph", **{library.CACHE_VARIABLE: str(cache)})
    assert warnings.startswith("1 warnings: keras_das uses its reference implementation: ")
    reason = warnings.partition("implementation: ")[2]
    assert str(cache) in reason
    assert native.startswith(f'native: implementation="native" cannot be used: {reason}')


def test_tensorflow_without_the_header(monkeypatch, tmp_path):
    """As TensorFlow 2.18 is."""
    import tensorflow as tf

    monkeypatch.setattr(tf.sysconfig, "get_include", lambda: str(tmp_path))
    with pytest.raises(library.LibraryUnavailable, match=r"comes without its header xla/ffi/api/ffi\.h"):
        library.target("tensorflow")
