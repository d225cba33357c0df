"""pairs: the best-scored response of a prompt against its worst (arXiv:2401.10020 section 2.2, step 2).

Or, against growing length, the shortest of the good ones against the longest of the bad (arXiv:2407.19594).

No response without a score is ever in a pair, a tie makes none, a cut response is never chosen; whatever is left out
is named in the drops with its reason.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import schemas
from srlm_core.config import PairsConfig
from srlm_core.store import digest

VERSION = 1

_EPSILON = 1e-9
"""Means of equal verdicts may differ in the last bit; that is a tie."""


def repetition(text: str) -> float:
    """Return the share of word 4-grams that repeat an earlier one: 0 for ordinary text, near 1 for a loop."""
    words = text.split()
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def may_be_chosen(response: Mapping[str, Any], config: PairsConfig) -> bool:
    """Whether it ended by itself, is no longer than allowed, does not run in a loop, and is of no early model."""
    if response["source"] == "early" or response["finish_reason"] != "stop":
        return False
    if repetition(response["response"]) > config.max_repetition:
        return False
    return config.max_chosen_chars is None or len(response["response"]) <= config.max_chosen_chars


def may_be_rejected(response: Mapping[str, Any], config: PairsConfig) -> bool:
    """Whether it ended by itself, or a setting lets cut ones be rejected, and is of no future model."""
    return response["source"] != "future" and (response["finish_reason"] == "stop" or config.truncated_rejected)


class Side(NamedTuple):
    """One response of a pair; no score where none was given."""

    text: str
    response_id: str
    score: float | None = None


def row(
    prompt: Mapping[str, Any],
    chosen: Side,
    rejected: Side,
    *,
    iteration: int,
    kind: str = "response",
    label: float | None = 1.0,
) -> dict[str, Any]:
    """Lay out a pair of responses to a prompt, or of judgments where `messages` asks for one; a row of PAIRS.

    `label`: the probability that chosen is the better one; null where nobody said, and the two are in any order.
    """
    return {
        "pair_id": digest(chosen.response_id, rejected.response_id, iteration, kind),
        "prompt_id": prompt["prompt_id"],
        "iteration": iteration,
        "kind": kind,
        "messages": prompt["messages"],
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_id": chosen.response_id,
        "rejected_id": rejected.response_id,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "label": label,
        "weight": 1.0,
    }


def drop(prompt: Mapping[str, Any], reason: str, *, iteration: int) -> dict[str, object]:
    """Lay out why a prompt gives no pair; a row of DROPS."""
    return {"id": prompt["prompt_id"], "stage": "pairs", "reason": reason, "iteration": iteration, "detail": None}


def best_and_worst(
    prompts: pa.Table,
    responses: pa.Table,
    scores: Mapping[str, float],
    config: PairsConfig,
    *,
    iteration: int,
    labels: Mapping[str, float | None] | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Pair each prompt's highest with its lowest score; rows PAIRS, in prompt order, and DROPS.

    Equal highest (or lowest) scores: the response with the lower index, so row order does not matter. `labels`: prompt
    id to the probability that its chosen is the better one, null where it is not known; none given: 1.
    """
    candidates: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for response in responses.to_pylist():
        candidates[response["prompt_id"]].append(response)
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for prompt in prompts.to_pylist():
        chosen_rejected, reason = _select(candidates[prompt["prompt_id"]], scores, config)
        label = 1.0 if labels is None else labels.get(prompt["prompt_id"])
        if chosen_rejected is None or label is None:
            drops.append(drop(prompt, reason or "no_label", iteration=iteration))
        else:
            best, worst = (
                Side(side["response"], side["response_id"], scores[side["response_id"]]) for side in chosen_rejected
            )
            rows.append(row(prompt, best, worst, iteration=iteration, label=label))
    return schemas.table(rows, schemas.PAIRS), schemas.table(drops, schemas.DROPS)


def _select(
    responses: Sequence[dict[str, Any]], scores: Mapping[str, float], config: PairsConfig
) -> tuple[tuple[dict[str, Any], dict[str, Any]] | None, str]:
    """Return (chosen, rejected) and an empty reason, or null and why there is no pair."""
    scored = sorted((r for r in responses if r["response_id"] in scores), key=lambda response: response["index"])
    if len(scored) < 2:
        return None, "fewer_than_two_scored"
    best = [place for place, response in enumerate(scored) if may_be_chosen(response, config)]
    worst = [place for place, response in enumerate(scored) if may_be_rejected(response, config)]
    if not best or not worst:
        return None, "none_may_be_chosen" if not best else "none_may_be_rejected"
    chosen_rejected = extremes(
        [scores[r["response_id"]] for r in scored],
        [len(r["response"]) for r in scored],
        config.length_control,
        may_be_chosen=best,
        may_be_rejected=worst,
    )
    if chosen_rejected is None:
        return None, _why_none([scores[scored[place]["response_id"]] for place in {*best, *worst}])
    chosen, rejected = (scored[place] for place in chosen_rejected)
    margin = scores[chosen["response_id"]] - scores[rejected["response_id"]]
    if margin < config.min_margin - _EPSILON:
        return None, "margin_too_small"
    return (chosen, rejected), ""


def _why_none(scores: Sequence[float]) -> str:
    """Say why no response may be chosen over another, of the scores of those that may be in a pair."""
    if len(scores) == 1:
        return "only_one_may_be_paired"
    return "tie" if max(scores) - min(scores) <= _EPSILON else "none_better_may_be_chosen"


def extremes(
    scores: Sequence[float],
    lengths: Sequence[int],
    length_control: float = 0.0,
    *,
    may_be_chosen: Sequence[int] | None = None,
    may_be_rejected: Sequence[int] | None = None,
) -> tuple[int, int] | None:
    """Return the places of chosen and rejected among a prompt's responses, or null where none is above another.

    The highest and the lowest score; under length control (rho, a share of the scores' range) the shortest of those
    within rho of the top and the longest of those within rho of the bottom. Always the first of equals. Not given: all
    may be chosen, or rejected; else these places, of which there must be one at least.
    """
    good, bad = (range(len(scores)) if of is None else of for of in (may_be_chosen, may_be_rejected))
    top, bottom = max(scores[place] for place in good), min(scores[place] for place in bad)
    if top - bottom <= _EPSILON:
        return None
    if not length_control:
        near = _EPSILON / 2  # more than the last bit, and never one response on both sides
        return next(p for p in good if scores[p] >= top - near), next(p for p in bad if scores[p] <= bottom + near)
    depth = (top - bottom) * length_control + _EPSILON
    tiers = [p for p in good if scores[p] >= top - depth], [p for p in bad if scores[p] <= bottom + depth]
    return min(tiers[0], key=lengths.__getitem__), max(tiers[1], key=lengths.__getitem__)
