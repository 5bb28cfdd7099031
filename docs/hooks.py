"""MkDocs hooks: pages from other folders of the repository, and equations.

Pages contain equations in GitHub's notation, `$...$` and `$$...$$`. They become MathML, which browsers
render without a script.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/METHOD.md": "METHOD.md",
    "benchmarks/RESULTS.md": "RESULTS.md",
    "examples/README.md": "training.md",
    "examples/serve.md": "serve.md",
}
"""Files of the repository, and their names on the site."""
_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>(?P<after>[.,:;)]*)',
    re.DOTALL,
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from other folders."""
    for path, name in ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrites links between `docs` and other folders, which are correct on GitHub, for the site."""
    for path, name in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{path}", f"]({name}")
    return markdown.replace("](../docs/", "](")


def on_page_content(content: str, **_: Any) -> str:
    """Writes equations as MathML."""
    return _EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    latex = html.unescape(found["latex"]).strip()
    if found["tag"] == "div":
        return convert(latex, display="block") + found["after"]
    # Browsers would break the line between an equation and a comma.
    return f'<span class="nowrap">{convert(latex)}{found["after"]}</span>'
