"""A griffe extension that formats docstring sections unknown to the Google style as Markdown."""

import re
from typing import Any

import griffe

# "Example:" and its text, up to the next section. The text of an example is not indented.
_EXAMPLE = re.compile(r"^Example:\n\n(?P<text>.*?)(?=^Reference:|\Z)", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(
    r"^(?P<title>Input shape|Output shape|Reference):\n(?P<text>(?:(?:    .*)?\n)*(?:    .*)?)", re.MULTILINE
)


class Sections(griffe.Extension):
    """Rewrites all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites one docstring; constructors have none of their own on the site."""
        if obj.name == "__init__" and obj.is_function:
            obj.docstring = None
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(docstring: str) -> str:
    """Makes titles bold and sessions blocks of code."""
    docstring = _EXAMPLE.sub(lambda found: f"**Example**\n\n{_sessions(found['text'])}\n\n", docstring)
    return _INDENTED.sub(lambda found: f"**{found['title']}**\n\n{_dedent(found['text'])}\n", docstring)


def _sessions(text: str) -> str:
    return "\n\n".join(f"```pycon\n{block}\n```" for block in re.split(r"\n\n+", text.strip()))


def _dedent(text: str) -> str:
    return re.sub(r"^    ", "", text, flags=re.MULTILINE)
