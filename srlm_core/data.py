"""Reading what the user brings: prompts, instruction-response rows, ranked groups; and the seed corpus.

A malformed line is set aside with its reason and the rest goes on; a file with no good line is an error.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srlm_core.errors import ConfigError, DataError
from srlm_core.store import digest

SEED = Path(__file__).parent / "seed"


class SetAside(NamedTuple):
    """A line that could not be used."""

    line: int
    reason: str
    text: str


class Loaded(NamedTuple):
    """The good rows of a file, and what was set aside."""

    rows: list[dict[str, Any]]
    set_aside: list[SetAside]
    identity: str
    """Hash of the good rows: part of the fingerprint of what is made from them."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def check_prompt(row: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a prompt row: {"prompt": text}."""
    return None if _is_text(row.get("prompt")) else "expected a non-empty text under 'prompt'"


def check_example(row: Mapping[str, Any]) -> str | None:
    """Say what is wrong with an instruction-response row."""
    for key in ("instruction", "response"):
        if not _is_text(row.get(key)):
            return f"expected a non-empty text under {key!r}"
    return None


def check_group(row: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a ranked group: {"prompt", "responses": [{"text", "rank", …}, …]}, rank 0 = best."""
    if not _is_text(row.get("prompt")):
        return "expected a non-empty text under 'prompt'"
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        return "expected a list of two or more under 'responses'"
    for response in responses:
        if not isinstance(response, dict) or not _is_text(response.get("text")):
            return "expected a non-empty 'text' in each response"
        if not isinstance(response.get("rank"), int):
            return "expected a whole number 'rank' in each response (0 = best)"
    return None


def check_judged_group(row: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a ranked group that teaches judging: each response has a 'score' and a 'judgment'."""
    wrong = check_group(row)
    if wrong:
        return wrong
    for response in row["responses"]:
        if not isinstance(response.get("score"), int | float) or not 0 <= response["score"] <= 5:
            return "expected a 'score' from 0 to 5 in each response"
        if not _is_text(response.get("judgment")):
            return "expected a written 'judgment' in each response"
    return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"expected a readable file at {path}, got: {error.strerror}. Check the path.") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected UTF-8 text in {path}, got byte {raw[error.start]:#04x} at offset {error.start}. "
            f"Convert it, e.g. `iconv -f latin1 -t utf-8 {path.name}`."
        ) from error
    # not splitlines(): JSON strings may hold U+2028 and its like
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip("\r")


def load(path: Path, check: Callable[[Mapping[str, Any]], str | None]) -> Loaded:
    """Read a JSON-lines file (or, for .txt, one prompt a line). Raises DataError if nothing in it can be used."""
    rows: list[dict[str, Any]] = []
    aside: list[SetAside] = []
    for number, line in _lines(path):
        try:
            row = {"prompt": line} if path.suffix == ".txt" else json.loads(line)
        except ValueError as error:
            aside.append(SetAside(number, f"not JSON: {error}", line))
            continue
        wrong = check(row) if isinstance(row, dict) else f"expected an object, got {type(row).__name__}"
        if wrong:
            aside.append(SetAside(number, wrong, line))
        else:
            rows.append(row)
    if not rows:
        seen = f"{len(aside)} lines, none usable; line {aside[0].line}: {aside[0].reason}" if aside else "an empty file"
        raise DataError(f"expected rows in {path}, got {seen}.")
    return Loaded(rows, aside, digest(rows))


def load_named(name: str, seed_file: str, check: Callable[[Mapping[str, Any]], str | None]) -> Loaded:
    """Read a user's file, or the seed corpus' own where the name is `seed`."""
    return load(SEED / seed_file if name == "seed" else Path(name).expanduser(), check)


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
