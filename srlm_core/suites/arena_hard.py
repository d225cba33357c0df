"""arena_hard: Arena-Hard (Li et al., arXiv:2406.11939): hard prompts, two games each against a baseline's answer.

The judge says one of five things: A much better, A better, a tie, B better, B much better. In the second game the
answers change places. A strong verdict counts three times, as in the official tool; the interval is a bootstrap over
prompts, from 5 to 95 %. The template is ours.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from srlm_core import judgments
from srlm_core.errors import DataError
from srlm_core.judgments import Verdict
from srlm_core.rates import Rate, rate
from srlm_core.suites.record import BASELINE, Asked, Item, Judge, Suite, Tables, by_item, rows_of, written

_MARK = re.compile(r"\[\[\s*([AB])\s*(<<|<|=|>|>>)\s*([AB])\s*\]\]")
_LEVEL = {"<<": 0, "<": 1, "=": 2, ">": 3, ">>": 4}
STRONG = 3
"""How many times a strong verdict counts."""
BOOTSTRAPS = 100


def read(where: str) -> list[Item]:
    """Read a folder with question.jsonl and one baseline's answers: baseline.jsonl, or model_answer/NAME.jsonl.

    Rows as Arena-Hard publishes them, of its first or its second version.
    """
    folder = Path(where).expanduser()
    found = sorted(folder.glob("baseline.jsonl")) or sorted(folder.glob("model_answer/*.jsonl"))
    if len(found) != 1:
        raise DataError(
            f"expected one baseline's answers (baseline.jsonl or model_answer/NAME.jsonl) in {folder}, "
            f"got {', '.join(path.name for path in found) or 'no answers'}. Put the baseline's file there alone."
        )
    said = {_name(row): _answer(row) for row in rows_of(found[0], ())}
    rows = rows_of(folder / "question.jsonl", ())
    asked = [(_prompt(row), said.get(_name(row)), row) for row in rows]
    items = [
        Item(_name(row), (prompt,), row.get("category") or row.get("cluster") or "", (answer,), 0.0)
        for prompt, answer, row in asked
        if prompt and answer
    ]
    if not items:
        raise DataError(f"expected questions in {folder} that {found[0].name} answers, got none of {len(rows)}.")
    return items


def _name(row: dict[str, Any]) -> str:
    return str(row.get("question_id") or row.get("uid"))


def _prompt(row: dict[str, Any]) -> str | None:
    return row.get("prompt") or next((turn["content"] for turn in row.get("turns") or ()), None)


def _answer(row: dict[str, Any]) -> str | None:
    if row.get("choices"):
        return row["choices"][0]["turns"][0]["content"]
    last = (row.get("messages") or [{}])[-1].get("content")
    return last.get("answer") if isinstance(last, dict) else last


def judge(items: Sequence[Item], answers: pa.Table, by: Judge) -> Tables:
    """Play two games for each prompt; verdict = how the model's answer fared, 0 (much worse) to 4 (much better)."""
    rubric = judgments.load_rubric("arena_hard", justified=None)
    games: list[list[Asked]] = [[], []]
    for item, (row, *_) in by_item(items, answers):
        own, other = row["response"], item.references[0]
        for game, (first, second) in enumerate(((other, own), (own, other))):
            messages = rubric.ask(prompt=item.turns[0], first=first, second=second)
            shown = BASELINE if game == 0 else row["response_id"]
            games[game].append(Asked(item, game, row["response_id"], messages, shown))
    played = [
        written(asked, by, verdict, form="pairwise", rubric=rubric.identity)
        for asked, verdict in zip(games, (for_second, for_first), strict=True)
    ]
    return pa.concat_tables(rows for rows, _ in played), pa.concat_tables(drops for _, drops in played)


def for_first(text: str, finish_reason: str) -> Verdict:
    """Read the last verdict in double brackets, such as [[A>>B]] (or [[B<<A]]): how A fared, from 0 to 4."""
    if finish_reason != "stop":
        return Verdict(None, judgments.why_not_whole(finish_reason))
    marks = [found for found in _MARK.findall(text) if found[0] != found[2]]
    if not marks:
        return Verdict(None, "no_verdict")
    left, sign, _ = marks[-1]
    level = _LEVEL[sign]
    return Verdict(float(level if left == "A" else 4 - level), None)


def for_second(text: str, finish_reason: str) -> Verdict:
    """Read how B fared."""
    read_one = for_first(text, finish_reason)
    return read_one if read_one.value is None else Verdict(4 - read_one.value, None)


def measure(items: Sequence[Item], answers: pa.Table, verdicts: pa.Table | None) -> dict[str, Any]:
    """Return the share of points against the baseline, a tie one half, with its 5 to 95 % interval over prompts."""
    if verdicts is None:
        return {"answered": len(by_item(items, answers))}
    rows = verdicts.to_pylist()
    games: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["verdict"] is not None:
            games[row["prompt_id"]].append(row["verdict"])
    weighed = np.array([_points(levels) for levels in games.values()]).reshape(-1, 2)
    both = [levels for levels in games.values() if len(levels) == 2]
    told = {
        "readable_rate": rate([float(row["verdict"] is not None) for row in rows])._asdict(),
        "flip_rate": rate([float((a - 2) * (b - 2) < 0) for a, b in both])._asdict(),
    }
    if not len(weighed):
        return {"win_rate": rate([])._asdict(), "interval": None, **told}
    drawn = np.random.default_rng(0).integers(0, len(weighed), size=(BOOTSTRAPS, len(weighed)))
    points = weighed[drawn].sum(axis=1)
    shares = points[:, 0] / points[:, 1]
    total = weighed.sum(axis=0)
    win_rate = Rate(float(total[0] / total[1]), float(shares.std()), len(weighed))
    interval = [float(np.percentile(shares, edge)) for edge in (5, 95)]
    return {"win_rate": win_rate._asdict(), "interval": interval, **told}


def _points(levels: Sequence[float]) -> tuple[float, float]:
    """Return what was won and what could be, over a prompt's games: 4 and 1 give 3 of 4."""
    weights = [STRONG if level in (0, 4) else 1 for level in levels]
    won = [weight * (0.5 if level == 2 else float(level > 2)) for weight, level in zip(weights, levels, strict=True)]
    return sum(won), float(sum(weights))


SUITE = Suite("arena_hard", read, measure, judge, ("arena_hard",))
