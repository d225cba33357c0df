"""spelling: numbers with their errors, and tables of them, written for people."""

import re
from collections.abc import Sequence


def spell(value: float | None, stderr: float | None = None, n: int | None = None, form: str = ".2f") -> str:
    """Write a number with its error and n: `0.61 ± 0.04 (n = 240)`; a dash where it is not known."""
    if value is None:
        return "–"
    text = f"{value:{form}}"
    text = text.lstrip("+-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")
    if stderr is not None:
        text += f" ± {stderr:{form.lstrip('+')}}"
    return text if n is None else f"{text} (n = {n})"


def in_columns(grid: Sequence[Sequence[str]]) -> list[str]:
    """Lay cells out for a terminal: the first column to the left, the others to the right, a rule under line 1."""
    label_width, *widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        "  ".join([label.ljust(label_width), *(text.rjust(width) for text, width in zip(texts, widths, strict=True))])
        for label, *texts in grid
    ]
    return [line.rstrip() for line in [lines[0], "─" * len(lines[0]), *lines[1:]]]


def escape_markdown(text: str) -> str:
    """Make a text harmless on one line of Markdown: nothing in it is markup, a table cell or a tag."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~&$:@/\"'=])", r"\\\1", re.sub(r"\s+", " ", text)).strip()
