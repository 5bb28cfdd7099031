"""What MkDocs is told beyond mkdocs.yml: pages that lie elsewhere in the repository, and equations.

Equations stand in the pages as GitHub reads them too, `$...$` and `$$...$$`, and become MathML, which
browsers draw without a script.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/accuracy.png", "examples/serve.md")
_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>(?P<after>[.,:;)]*)',
    re.DOTALL,
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that the site shares with the repository."""
    for path in ELSEWHERE:
        files.append(File.generated(config, Path(path).name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Has links to these files, which lead out of `docs` on GitHub, lead to the pages."""
    for path in ELSEWHERE:
        markdown = markdown.replace(f"](../{path}", f"]({Path(path).name}")
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Writes equations as MathML."""
    return _EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    latex = html.unescape(found["latex"]).strip()
    if found["tag"] == "div":
        return convert(latex, display="block") + found["after"]
    # Browsers would break the line between an equation and a comma.
    return f'<span class="nowrap">{convert(latex)}{found["after"]}</span>'
