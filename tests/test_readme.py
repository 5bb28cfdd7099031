"""Every block of Python in the README runs, but for those marked `no-run`, which need a download."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, block {number + 1}", "exec"), {})


def test_names_both_commands():
    assert re.search(r"^    make demo", README.read_text(), re.MULTILINE)
    assert re.search(r"^    make test", README.read_text(), re.MULTILINE)
