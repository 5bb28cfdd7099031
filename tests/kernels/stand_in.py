"""A fake kernel library with two small source files, because the real one takes minutes to compile.

    python -m tests.kernels.stand_in SOURCES ROOT

Builds the library from the sources in one folder into another, for tests that require a subprocess. This
module also provides invalid and damaged libraries.
"""

import hashlib
import json
import os
import pathlib
import stat
import sys
import textwrap

import pytest

from keras_das.kernels import builder, compilers, library
from keras_das.kernels.targets import Target, Unit

CUDA_UNIT = "cuda/kernels.cu.cc"
SOURCES = {
    CUDA_UNIT: 'extern "C" int on_gpu() { return 7; }\n',
    "answer.h": "int half_of_it();\n",
    "half.cc": '#include "answer.h"\nint half_of_it() { return HALF; }\n',
    "answer.cc": '#include "answer.h"\nextern "C" int answer() { return 2 * half_of_it(); }\n',
}


def make_target(folder, **changes):
    """Writes the sources of the fake library to `folder` and returns its target.

    `changes` are fields of `Target`.
    """
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    return target_of(folder, **changes)


def target_of(folder, **changes):
    units = (Unit("answer.cc"), Unit("half.cc", ("-DHALF=21",), "of it"))
    fields = {
        "framework": "jax",
        "version": "1.2.3",
        "abi": "1",
        "units": units,
        "sources": folder,
        **changes,
    }
    return Target(**fields)


def forge(target, root):
    """Writes an invalid library that passes all checks that precede loading, and returns its path."""
    folder = root / target.folder_name
    folder.mkdir(parents=True)
    content = b"\x7fELF" + bytes(2000)
    (folder / library.FILE).write_bytes(content)
    record = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "ingredients": target.ingredients,
        "cuda": target.cuda,
    }
    (folder / library.RECORD).write_text(json.dumps(record))
    return folder / library.FILE


def has_compiler():
    try:
        compilers.find_compiler()
    except compilers.NoCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler on this machine")


def build(target, root, **options):
    """Builds the fake library. Returns its path and the progress messages."""
    lines = []
    return builder.build(target, root, report=lines.append, **options), lines


def wrap_compiler(folder, monkeypatch, *commands):
    """Replaces the compiler with a script that logs each call, runs `commands`, and then compiles.

    Returns the path of the log.
    """
    log, wrapper = folder / "calls", folder / "compiler"
    lines = ["#!/bin/sh", f'echo "$@" >> {log}', *commands, f'exec {compilers.find_compiler()[0]} "$@"']
    wrapper.write_text("\n".join(lines) + "\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


def make_nvcc(folder):
    """Writes a fake nvcc that answers queries like nvcc and calls the C++ compiler. Returns its path."""
    compiler = compilers.find_compiler()[0] if has_compiler() else "none"
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


def forget_ingredients(file):
    record = json.loads((file.parent / library.RECORD).read_text())
    del record["ingredients"]
    (file.parent / library.RECORD).write_text(json.dumps(record))


def put_another_version_s(file):
    """Replaces the record with one of another version. The library and the record remain valid."""
    record = json.loads((file.parent / library.RECORD).read_text())
    record["ingredients"]["version"] = "0.9"
    (file.parent / library.RECORD).write_text(json.dumps(record))


def _report(line):
    print(line, flush=True)


if __name__ == "__main__":
    sources, root = map(pathlib.Path, sys.argv[1:])
    builder.build(target_of(sources), root, report=_report)
