"""A library of two small units in place of the kernels', which take minutes to compile; and forged ones.

    python -m tests.ops.stand_in SOURCES ROOT

builds the library of the units in one folder into another, for tests that need a process of its own.
"""

import hashlib
import json
import pathlib
import sys

from keras_das.ops import builder, library
from keras_das.ops.library import Target, Unit

SOURCES = {
    "answer.h": "int half_of_it();\n",
    "half.cc": '#include "answer.h"\nint half_of_it() { return HALF; }\n',
    "answer.cc": '#include "answer.h"\nextern "C" int answer() { return 2 * half_of_it(); }\n',
}


def make_target(folder, **changes):
    """The stand-in, its sources written to `folder`; `changes` are fields of Target."""
    folder.mkdir(exist_ok=True)
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


def forge(target, root, key=None, padding=1000):
    """A file that passes every check ahead of opening it, and is no library; `key` replaces the right one."""
    key = key or target.key
    folder = root / target.folder_name
    folder.mkdir(parents=True)
    content = b"\x7fELF" + bytes(padding) + f"{library.KEY_SYMBOL}={key}\0".encode() + bytes(padding)
    (folder / library.FILE).write_bytes(content)
    record = {
        "key": key,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "ingredients": target.ingredients,
    }
    (folder / library.RECORD).write_text(json.dumps(record))
    return folder / library.FILE


def _report(line):
    print(line, flush=True)


if __name__ == "__main__":
    sources, root = map(pathlib.Path, sys.argv[1:])
    builder.build(target_of(sources), root, report=_report)
