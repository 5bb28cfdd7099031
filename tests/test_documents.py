"""Tests of the documentation: code blocks run, commands exist, and links resolve."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import keras_das
from keras_das import cli, visualize

ROOT = Path(__file__).resolve().parents[1]
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = ["README.md", "examples/serve.md", *DOCS]
DOCUMENTS = [
    *WITH_CODE,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/METHOD.md",
    "benchmarks/RESULTS.md",
    "examples/README.md",
]

_BLOCK = re.compile(
    r"^(?:<!-- no-run: (?P<reason>\S[^\n]*) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
# These pages train models, export to several formats, or build full-size networks.
_SLOW = {
    "README.md",
    *(f"docs/{name}.md" for name in ("attach", "detection", "export", "fine-tune", "index", "visualize")),
}
_WITHOUT_PARSER = ("benchmarks/report.py",)  # accepts file names and no options


def read(document):
    return (ROOT / document).read_text()


# Code


def blocks(document):
    """Returns a pair for each Python block: the code, and the reason why it cannot run or None."""
    return [(found["code"], found["reason"]) for found in _BLOCK.finditer(read(document))]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in _SLOW else [])
        for page in WITH_CODE
        if "```py" in read(page)
    ],
)
def test_code_runs(document, tmp_path, monkeypatch):
    """Runs all blocks of a page in order, in one namespace and an empty working directory."""
    found = blocks(document)
    assert len(found) == read(document).count("```py"), "a fence or a marker is not as CONTRIBUTING.md has it"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, (code, reason) in enumerate(found, 1):
        if not reason:
            exec(compile(code, f"{document}, block {number}", "exec"), namespace)


def test_most_code_runs():
    reasons = [reason for document in WITH_CODE for _, reason in blocks(document)]
    assert len(reasons) - reasons.count(None) <= 5


# Commands


def commands(text):
    """Yields each command in a document, from code blocks and inline code."""
    fenced = "\n".join(re.findall(r"^```(?:bash|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = "\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE))
    lines = (fenced + "\n" + indented).replace("\\\n", " ").splitlines()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    for line in [*lines, *spans]:
        for part in re.split(r"&&|;", line):
            words = part.split()
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]  # an environment variable
            if words and words[0] in ("make", "python", "pytest", "keras-das"):
                yield shlex.join(shlex.split(" ".join(words), comments=True))


COMMANDS = sorted({command for document in DOCUMENTS for command in commands(read(document))})


class Parsed(BaseException):
    """Raised after the arguments are parsed successfully, before the program does anything else."""


@pytest.fixture
def parse_only(monkeypatch):
    """Stops programs once their arguments are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command, parse_only, monkeypatch):
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        assert set(targets) <= set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
    elif program == "keras-das":
        check_arguments(lambda: cli.main(arguments))
    elif arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1])
    else:
        check_script(arguments, monkeypatch)


def check_script(arguments, monkeypatch):
    script = ROOT / arguments[0]
    assert script.is_file()
    if arguments[0] in _WITHOUT_PARSER:
        assert all(argument.endswith(".json") for argument in arguments[1:])
        return
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(str(script.parent))
    check_arguments(lambda: runpy.run_path(str(script), run_name="__main__"))


def check_arguments(run):
    with pytest.raises((Parsed, SystemExit)) as ended:
        run()
    # `--help` exits with status 0.
    assert ended.type is Parsed or ended.value.code == 0, "the program does not know these arguments"


def test_both_first_commands_are_named():
    assert {"make demo", "make test"} <= set(commands(read("README.md")))


# Links, names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    """Checks links within the repository. The strict build of the site checks links between its pages."""
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not re.match(r"https?:|#", link):
            assert (ROOT / document).parent.joinpath(link.partition("#")[0]).exists(), link


def test_reference_has_every_public_name():
    described = set(re.findall(r"^::: (\S+)", "\n".join(map(read, DOCS)), re.MULTILINE))
    assert {"keras_das.ops", "keras_das.visualize"} <= described  # documented as whole modules
    names = set(keras_das.__all__) - {"ops", "visualize", "__version__"}
    assert {f"keras_das.{name}" for name in names} <= described


def test_visualize_page_shows_what_there_is():
    """The page shows each figure that the module draws."""
    drawn = [name for name in dir(visualize) if name.startswith("plot_")]
    assert len(drawn) == 4
    assert all(f"visualize.{name}(" in read("docs/visualize.md") for name in drawn)


def test_reference_has_the_fields_of_sampling_points():
    rows = re.findall(r"^\| `(\w+)` \|", read("docs/api/visualize.md"), re.MULTILINE)
    assert tuple(rows) == visualize.SamplingPoints._fields
