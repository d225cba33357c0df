"""What a campaign reads of the user's files and of the seed corpus: examples, ranked groups, prompts.

A row that cannot be used is set aside with its reason and the rest goes on; a file with no good row is an error.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from srlm_core import sources
from srlm_core.errors import ConfigError, DataError
from srlm_core.sources.forms import SetAside
from srlm_core.store import digest

SEED = Path(__file__).parent / "seed"


class Loaded(NamedTuple):
    """The good rows of a file, and what was set aside."""

    rows: list[dict[str, Any]]
    set_aside: list[SetAside]
    identity: str
    """Hash of the good rows: part of the fingerprint of what is made from them."""


def unchecked(row: Mapping[str, Any]) -> str | None:
    """Take a row as it is."""
    return None


def load(
    where: str | Path,
    take: Literal["examples", "groups", "prompts"],
    *,
    check: Callable[[Mapping[str, Any]], str | None] = unchecked,
) -> Loaded:
    """Read what is wanted of a file or dataset; `check` says what is wrong with a row.

    Raises DataError where no row is good.
    """
    source = sources.read(str(where))
    told = [(row, check(row)) for row in getattr(source, take)]
    aside = source.set_aside + [SetAside(None, wrong, str(row)[:300]) for row, wrong in told if wrong]
    rows = [row for row, wrong in told if not wrong]
    if not rows:
        seen = f"{source.n_rows} row(s) of {source.form or 'no known form'}" if source.n_rows else "an empty file"
        why = f"; first: {aside[0].reason}" if aside else ""
        raise DataError(f"expected {take} in {where}, got {seen}{why}. `srlm data {where}` shows what it holds.")
    return Loaded(rows, aside, digest(rows))


def named(name: str, seed_file: str) -> str:
    """Return where to read: what the user names, or the seed corpus' own file for `seed`."""
    return str(SEED / seed_file) if name == "seed" else name


def check_judged(group: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a ranked group that teaches judging: each response has a 'score' and a 'judgment'."""
    for response in group["responses"]:
        if not isinstance(response.get("score"), int | float) or not 0 <= response["score"] <= 5:
            return "expected a 'score' from 0 to 5 in each response"
        if not isinstance(response.get("judgment"), str) or not response["judgment"].strip():
            return "expected a written 'judgment' in each response"
    return None


def asked(row: Mapping[str, Any]) -> list[str]:
    """Return what a person asked in a row: of a conversation, each turn."""
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return turns
    return [row["prompt"] if "prompt" in row else row["instruction"]]


def attacks() -> list[dict[str, Any]]:
    """Read the shipped responses that try to win a score: {"form", "prompt", "response", "attack"}."""
    return _shipped("attacks.jsonl")


def requests() -> list[dict[str, Any]]:
    """Read the shipped requests that should be refused, and those that only sound so: {"prompt", "harmful"}."""
    return _shipped("requests.jsonl")


def _shipped(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SEED / name).read_text(encoding="utf-8").splitlines()]


def of_kinds(rows: Sequence[dict[str, Any]], kinds: Sequence[str], setting: str) -> list[dict[str, Any]]:
    """Take the rows of these kinds, or all for none named; raises ConfigError for a kind that no row has."""
    known = {row.get("kind", "") for row in rows}
    if unknown := [kind for kind in kinds if kind not in known]:
        there = ", ".join(sorted(known - {""})) or "none"
        raise ConfigError(
            f"{setting}: expected kinds that the instructions taken have ({there}), "
            f"got {', '.join(map(repr, unknown))}. Name others, or leave it empty for all rows."
        )
    return [row for row in rows if not kinds or row.get("kind", "") in kinds]


def spread(rows: Sequence[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """Take `count` rows, evenly over their kinds and in file order within each; all of them for null."""
    if count is None or count >= len(rows):
        return list(rows)
    by_kind: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        by_kind.setdefault(row.get("kind", ""), []).append(position)
    taken: list[int] = []
    depth = 0
    while len(taken) < count:
        taken += [positions[depth] for positions in by_kind.values() if depth < len(positions)]
        depth += 1
    return [rows[position] for position in sorted(taken[:count])]
