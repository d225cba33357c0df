"""comparisons: a judge says which of two responses is better, each pair of them in both orders.

p is read off the next token, nothing is written. A pair that was not judged in both orders counts for nothing: a single
order measures the place as much as the response. Win rates after arXiv:2405.00675 section 4 and arXiv:2404.03715.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa

from srlm_core import judgments, schemas
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Engine, Message, Request, Sampling
from srlm_core.judgments import Verdict
from srlm_core.store import digest, seed_for

VERSION = 1
PLACES = ("ab", "ba")
"""The orders in which two responses are shown."""
ORDERS = len(PLACES)
"""Passes over each two responses."""

# a marker with the side that it names, and what else stands on its line
_BETTER = re.compile(r"\b(?i:better)\W{0,3}[:=][\s*_\[(]*([AB])\b([^\n]*)")
_SIDE = re.compile(r"\b[AB]\b")


class Match(NamedTuple):
    """Two responses to one prompt."""

    prompt_id: str
    prompt: str
    a_id: str
    a: str
    b_id: str
    b: str


def texts(config: RunConfig) -> list[str]:
    """Identify the template that a comparison is asked with and, where it is explained, how that is drawn."""
    how = _explanation(config)
    return [pairwise(justified=how is not None).identity, *([repr(how)] if how else [])]


def pairwise(*, justified: bool = False) -> judgments.Rubric:
    """Load what the judge is asked which response is better with: for the verdict alone, or after an explanation."""
    asks_with = ("prompt", "first", "second")
    return judgments.load_rubric("pairwise", justified=justified, kind="better_", asks_with=asks_with)


def _explanation(config: RunConfig) -> Sampling | None:
    """Return how the loop's judge draws an explanation before it says which is better; None where it gives none."""
    if not config.judgments.comparisons_justified:
        return None
    how = config.judgments.sampling
    return Sampling(how.temperature, how.top_p, how.max_tokens)


class AsAsked(TypedDict):
    """How the loop asks for comparisons; see `compare`."""

    rubric: judgments.Rubric
    explained: Sampling | None
    seed: int


def as_asked(config: RunConfig) -> AsAsked:
    """Return how the loop's judge is asked to compare: for the verdict alone, or after an explanation."""
    how = _explanation(config)
    return {"rubric": pairwise(justified=how is not None), "explained": how, "seed": config.seed}


def all_pairs(prompts: pa.Table, responses: Iterable[Mapping[str, Any]]) -> list[Match]:
    """Match each two responses of a prompt, the one of the lower index as `a`: n (n - 1) / 2 of n."""
    asked = {row["prompt_id"]: schemas.conversation(row["messages"]) for row in prompts.to_pylist()}
    said: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(responses, key=lambda row: row["index"]):
        said[row["prompt_id"]].append(row)
    return [
        Match(prompt, text, a["response_id"], a["response"], b["response_id"], b["response"])
        for prompt, text in asked.items()
        for a, b in itertools.combinations(said[prompt], 2)
    ]


def compare(
    played: Sequence[Match],
    engine: Engine,
    *,
    judge_name: str,
    iteration: int = 0,
    stage: str = "evaluation",
    rubric: judgments.Rubric | None = None,
    also: Mapping[str, Mapping[str, str]] | None = None,
    explained: Sampling | None = None,
    seed: int = 0,
) -> tuple[pa.Table, pa.Table]:
    """Judge each match in both orders; rows JUDGMENTS (form pairwise, verdict = p(first is better)), and DROPS.

    `rubric`: another template, and `also`, by prompt id, what else it is filled in with. `explained`: how an
    explanation is drawn before the verdict is read; none: the verdict alone.
    """
    rubric, also = rubric or pairwise(), also or {}
    shown = {f"{order}/{number}": (match, order) for number, match in enumerate(played) for order in PLACES}
    asked = {key: ask(rubric, *place, **also.get(place[0].prompt_id, {})) for key, place in shown.items()}
    before = _explain(asked, engine, explained, seed) if explained else dict.fromkeys(asked, "")
    requests = [
        Request(key, messages=asked[key], prefix=f"{text}{schemas.BETTER_LINE}") for key, text in before.items()
    ]
    told = {scores.request_id: scores for scores in engine.token_scores(requests, schemas.SHOWN)}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for key, (match, order) in shown.items():
        logprobs = told[key].logprobs if key in told else None
        if logprobs is None:
            why = "no_answer" if key in told and told[key].missing != "too_long" else "judge_prompt_too_long"
            name = digest(order, match.prompt_id, match.a_id, match.b_id)
            drops.append({"id": name, "stage": stage, "reason": why, "iteration": iteration, "detail": None})
        else:
            p_first = judgments.read_off(judgments.normalise(logprobs)[0])
            text = f"{before[key]}{schemas.BETTER_LINE}A:{p_first:.3f} B:{1 - p_first:.3f}"
            rows.append({**row(match, order, judge_name, rubric.identity, iteration), "text": text, "verdict": p_first})
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


def _explain(asked: Mapping[str, tuple[Message, ...]], engine: Engine, how: Sampling, seed: int) -> dict[str, str]:
    """Write an explanation of each, up to its verdict; what does not fit the context has none."""
    how = replace(how, stop=(schemas.BETTER_LINE.strip(),))
    requests = [Request(key, messages=messages, sampling=how, seed=seed_for(seed, "explain", messages[-1]["content"]))
                for key, messages in asked.items()]  # fmt: skip
    told = {done.request_id: done for done in engine.generate(requests)}
    return {key: f"{told[key].text.strip()}\n" for key in asked if told[key].finish_reason in ("stop", "length")}


def ask(rubric: judgments.Rubric, match: Match, order: str, **also: str) -> tuple[Message, ...]:
    """Render the question which of the two is better, `a` shown first in the order `ab`."""
    first, second = (match.a, match.b) if order == "ab" else (match.b, match.a)
    return rubric.ask(prompt=match.prompt, first=first, second=second, **also)


def parse_better(text: str, finish_reason: str) -> Verdict:
    """Read an explained verdict: 1 for A, shown first, 0 for B. One that names both, or none, is null with a reason.

    It is for what is taught: a text that says `Better: A` and later `Better: B` is no good judgment, whatever it means.
    """
    if finish_reason != "stop":
        return Verdict(None, judgments.why_not_whole(finish_reason))
    named = {side for found in _BETTER.finditer(text) for side in (found[1], *_SIDE.findall(found[2]))}
    if len(named) != 1:
        return Verdict(None, "both_named" if named else "none_named")
    if not explanation_in(text):
        return Verdict(None, "no_explanation")
    return Verdict(float(named == {"A"}), None)


def explanation_in(text: str) -> str:
    """Return what stands before the verdict and a new line, as where the verdict is asked for; empty for nothing."""
    found = _BETTER.search(text)
    before = text[: found.start() if found else None].strip().rstrip("*").rstrip()
    return f"{before}\n" if before else ""


def row(match: Match, order: str, judge: str, rubric: str, iteration: int) -> dict[str, object]:
    """Lay out who met whom in which order, as a row JUDGMENTS without a verdict and a text."""
    first, second = (match.a_id, match.b_id) if order == "ab" else (match.b_id, match.a_id)
    return {
        "judgment_id": digest(first, second, judge, rubric),
        "target_id": match.a_id,
        "other_id": match.b_id,
        "first": first,
        "prompt_id": match.prompt_id,
        "iteration": iteration,
        "index": 0 if order == "ab" else 1,
        "form": "pairwise",
        "reading": "expected",
        "judge": judge,
        "rubric": rubric,
        "text": "",
        "verdict": None,
        "unreadable_reason": None,
        "finish_reason": "stop",
        "seed": 0,
    }


# --- what they come to ----------------------------------------------------------------------------------------------


def in_both_orders(rows: pa.Table) -> dict[tuple[str, str], dict[bool, float]]:
    """Return the chance of target being better, shown first (True) and shown second, where both were judged."""
    return {pair: orders for pair, orders in by_pair(rows).items() if len(orders) == 2}


def by_pair(rows: pa.Table) -> dict[tuple[str, str], dict[bool, float]]:
    """Return the chance of target being better, shown first (True) and shown second, as far as they were judged."""
    seen: dict[tuple[str, str], dict[bool, float]] = defaultdict(dict)
    for row in rows.select(["target_id", "other_id", "first", "verdict"]).to_pylist():
        orders, a_first = seen[row["target_id"], row["other_id"]], row["first"] == row["target_id"]
        if row["verdict"] is not None:
            orders[a_first] = row["verdict"] if a_first else 1 - row["verdict"]
    return seen


def flips(rows: pa.Table) -> list[float]:
    """Return for each pair judged in both orders 1 where the order changes which is better, else 0."""
    return [float((of[True] > 0.5) != (of[False] > 0.5)) for of in in_both_orders(rows).values()]


class WinRates(NamedTuple):
    """What comparisons come to."""

    p: dict[tuple[str, str], float]
    """P(the first id is better than the second), mean of both orders; each pair both ways, and the two sum to 1."""
    mean: dict[str, float]
    """Response id to its mean P against the others of its prompt that it was compared with, 0 to 1."""
    missing: int
    """Pairs left out: one order was not judged. Those of which neither was have no row; they are in the drops."""


def win_rates(rows: pa.Table) -> WinRates:
    """Average the orders, then the opponents.

    A over B by 0.9 shown first and 0.7 shown second, over C by 0.6 and 0.6: P(A, B) = 0.8, P(B, A) = 0.2, A's mean 0.7.
    """
    both = in_both_orders(rows)
    p: dict[tuple[str, str], float] = {}
    against: dict[str, list[float]] = defaultdict(list)
    for (a, b), orders in both.items():
        p[a, b] = (orders[True] + orders[False]) / 2
        p[b, a] = 1 - p[a, b]
        against[a].append(p[a, b])
        against[b].append(p[b, a])
    mean = {name: math.fsum(values) / len(values) for name, values in against.items()}
    return WinRates(p, mean, len(by_pair(rows)) - len(both))
