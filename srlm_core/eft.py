"""eft: seed data for judging, made from human rankings (arXiv:2401.10020 section 3.1.1).

A target is the score that people's ranking gives a response; scores that are over-common are thinned. What the judge
is measured by is split off by prompt first, and no prompt teaches both answering and judging.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srlm_core import data
from srlm_core.contamination import words
from srlm_core.store import digest

BEST = 5
"""Points of the best response of a group, the most that the rubric gives; the worst has none."""
CAP = 2
"""A score may occur this many times as often as the median one."""

Group = dict[str, Any]


def split(groups: Iterable[Group], share: float) -> tuple[list[Group], list[Group]]:
    """Split groups into (training, measuring) by the hash of what opened the conversation: a tree stays together."""
    parts: tuple[list[Group], list[Group]] = ([], [])
    for group in groups:
        parts[int(digest("measures the judge", data.asked(group)[0]), 16) / 16**16 < share].append(group)
    return parts


def apart_from(groups: Iterable[Group], examples: Iterable[Mapping[str, Any]]) -> tuple[list[Group], list[Group]]:
    """Split groups into those whose prompt no example has, and the others."""
    taught = {tuple(words(row["instruction"])) for row in examples}
    parts: tuple[list[Group], list[Group]] = ([], [])
    for group in groups:
        parts[tuple(words(group["prompt"])) in taught].append(group)
    return parts


def scored(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Give each response the rubric points of its rank: the best 5, the worst 0, the others evenly between.

    Ranks 0, 1, 2 give 5, 3, 0; 0, 1, 1 give 5, 0, 0. Halves go up.
    """
    return [
        {**group, "responses": [{**r, "score": _points(r["rank"], _worst(group))} for r in group["responses"]]}
        for group in groups
    ]


def _worst(group: Group) -> int:
    return max(response["rank"] for response in group["responses"])


def _points(rank: int, worst: int) -> int:
    return math.floor(BEST * (1 - rank / worst) + 0.5)


def thinned(groups: Sequence[Group]) -> tuple[list[Group], list[tuple[Group, Mapping[str, Any]]]]:
    """Leave out responses whose score is over-common, drawn by hash: no score more than CAP times the median one.

    Returns the groups, without those that have no response left, and what was left out.
    """
    of_score: defaultdict[int, list[str]] = defaultdict(list)
    for group in groups:
        for response in group["responses"]:
            of_score[response["score"]].append(_key(group, response))
    most = CAP * statistics.median([len(keys) for keys in of_score.values()]) if of_score else 0
    kept = {key for keys in of_score.values() for key in sorted(keys)[: math.floor(most)]}
    out = [(group, r) for group in groups for r in group["responses"] if _key(group, r) not in kept]
    left = [
        {**group, "responses": [r for r in group["responses"] if _key(group, r) in kept]} for group in groups
    ]  # fmt: skip
    return [group for group in left if group["responses"]], out


def _key(group: Group, response: Mapping[str, Any]) -> str:
    return digest("eft", group["prompt"], response["text"])
