"""What users bring: prompts, examples and human rankings, in the forms in which they are published, read into one.

A row that cannot be used is set aside with its reason, and the rest goes on. `read` takes everything of a file;
`srlm data` shows it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from srlm_core.sources import forms, oasst
from srlm_core.sources.files import Broken, objects
from srlm_core.sources.forms import Found, SetAside, n_ordered_pairs


@dataclass
class Source:
    """Everything that a file holds, in the project's own form."""

    where: str
    form: str = ""
    """The form most of its rows have; empty where none is known."""
    n_rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    """{"instruction", "response"}: of a conversation its first turn, of a ranking its best."""
    n_ordered_pairs: int = 0
    """Pairs of usable responses of which one is ranked above the other."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """{"prompt", "responses": [{"text", "rank"}, …]}: rank = how many of the others are better, 0 = best."""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """{"prompt"}: each once, of whatever else the file holds too."""
    set_aside: list[SetAside] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    """What the form itself counts: trees, messages, languages."""

    def as_dict(self) -> dict[str, Any]:
        """Say what is here, what is taken and what is set aside, for JSON."""
        rows = {"examples": len(self.examples), "ranked_groups": len(self.groups), "prompts": len(self.prompts)}
        taken = {**rows, "ordered_pairs": sum(map(n_ordered_pairs, self.groups))}
        held = {**rows, "ordered_pairs": self.n_ordered_pairs}
        found = {"file": self.where, "form": self.form, "rows": self.n_rows, **held, **self.counts}
        return {**found, "taken": taken, "set_aside": dict(Counter(aside.reason for aside in self.set_aside))}


def read(where: str, *, language: str = "en") -> Source:
    """Read a file (JSON lines, JSON, CSV, TSV, Parquet, text; also .gz), a dataset's folder, or one of the hub by name.

    `language` is taken where the rows say theirs. Raises DataError where the file cannot be read at all.
    """
    source = Source(where)
    seen: Counter[str] = Counter()
    messages: list[oasst.Message] = []
    for number, row in objects(where):
        source.n_rows += 1
        if isinstance(row, Broken):
            source.set_aside.append(SetAside(number, row.reason, row.text))
            continue
        if tree := oasst.messages_of(number, row):
            seen[tree.form] += 1
            messages += tree.messages
            source.set_aside += tree.set_aside
            continue
        found = forms.read_row(number, row)
        seen[found.form] += 1
        _take(source, found)
    if messages:
        _take(source, oasst.read_trees(messages, language))
    source.prompts = first_of_each(source.prompts, "prompt")
    source.form = seen.most_common(1)[0][0] if seen else ""
    return source


def first_of_each(rows: Iterable[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Take the first row of those that have the same under a column, in order."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row[column], row)
    return list(first.values())


def _take(source: Source, found: Found) -> None:
    source.examples += found.examples
    source.groups += found.groups
    source.n_ordered_pairs += found.n_ordered_pairs
    source.prompts += found.prompts
    source.set_aside += found.set_aside
    source.counts |= found.counts


def as_text(source: Source) -> str:
    """Lay out for a terminal what a file holds, with an example of each kind of row that was set aside."""
    told = source.as_dict()
    lines = [f"{source.where}: {source.n_rows} rows, {source.form or 'of no form that is known'}"]
    lines += [f"  {name.replace('_', ' '):<16}{_listed(told[name])}" for name in (*told["taken"], *source.counts)]
    if source.set_aside:
        lines.append("set aside:")
    for reason, count in Counter(aside.reason for aside in source.set_aside).most_common():
        first = next(aside for aside in source.set_aside if aside.reason == reason)
        lines.append(f"  {count:>6}  {reason} (first: row {first.line}, {' '.join(first.text.split())[:60]!r})")
    return "\n".join(lines)


def _listed(value: Any) -> str:
    return ", ".join(f"{name} {n}" for name, n in value.items()) if isinstance(value, dict) else str(value)
