"""pages: how reports are written: HTML and Markdown from templates, in which what models wrote stays text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from srlm_core import store
from srlm_core.report_figures import Figure
from srlm_core.show import visible
from srlm_core.spelling import escape_markdown


def write(target: Path, name: str, content: Mapping[str, Any], figures: Mapping[str, Figure]) -> Path:
    """Write a report into a folder: index.html, {name}.md and its figures; return the path of the page.

    The templates are {name}_template.html.j2 and {name}_template.md.j2.
    """
    for figure in figures.values():
        store.write_text(target / "figures" / f"{figure.name}.svg", figure.file)
    for stale in (target / "figures").glob("*.svg"):
        if stale.stem not in figures:
            stale.unlink()
    filled = {**content, "figures": figures}
    store.write_text(target / f"{name}.md", markdown().get_template(f"{name}_template.md.j2").render(filled))
    page = target / "index.html"
    store.write_text(page, html().get_template(f"{name}_template.html.j2").render(filled))
    return page


def _environment(**differs: Any) -> Environment:
    here = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=here, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **differs)


def html() -> Environment:
    """Make the environment of the pages: it escapes everything, and marks nothing safe but our own figures."""
    environment = _environment(
        autoescape=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["figure"] = _inline
    environment.filters["unbroken"] = lambda text: text.replace(" ± ", "\xa0±\xa0").replace("(n = ", "(n\xa0=\xa0")
    return environment


def _inline(figure: Figure) -> Markup:
    return Markup(figure.inline)  # drawn by matplotlib, which escapes the labels


class Safe(str):
    """Markdown that is already safe to write."""


def markdown() -> Environment:
    """Make the environment of Markdown: it escapes every value; texts of models go through `fence`."""
    environment = _environment(
        autoescape=False,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Safe) else escape_markdown(visible(str(value))),
    )
    environment.filters["fence"] = fence
    environment.filters["prose"] = _prose
    environment.filters["done"] = Safe  # what a macro made was escaped inside it
    return environment


def _prose(text: str) -> str:
    """Our own sentences: only what would be markup in the middle of a line is escaped, so that they stay readable."""
    return Safe(re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", visible(text)))


def fence(text: str) -> str:
    """Put a text between fences longer than any run of backticks in it."""
    text = visible(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    bars = "`" * max(3, longest + 1)
    return Safe(f"{bars}text\n{text.rstrip()}\n{bars}")
