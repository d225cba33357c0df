"""eft: seed data for judging, made from human rankings (arXiv:2401.10020 section 3.1.1).

A target is a judgment that a model wrote, kept where its scores agree with people's ranking, or the score that the
ranking gives a response. Scores that are over-common are thinned. What the judge is measured by is split off by prompt
first, and no prompt teaches both answering and judging.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from srlm_core import data
from srlm_core.config import JudgmentsConfig, SeedDataConfig
from srlm_core.contamination import words
from srlm_core.schemas import SCORE_LINE
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


def judging(seed: SeedDataConfig, loop: JudgmentsConfig) -> JudgmentsConfig:
    """Return how ranked responses are judged: as the loop does, but whole, and always with a justification.

    Where the ranks give the scores, one justification is wanted, and the score line that is put below it again.
    """
    given = seed.eft_targets == "ranked"
    changed = {
        "reading": "guided" if given and not seed.eft_endpoint else "text", "justified": True,
        "k": 1 if given else seed.eft_passes, "min_valid": None, "sampling": seed.eft_sampling, "steps": None,
    }  # fmt: skip
    return loop.model_copy(update=changed)


class Said(NamedTuple):
    """One judgment of one response: its score, null where it could not be read, and its text."""

    score: float | None
    text: str


class Targets(NamedTuple):
    """What became of groups that a judge judged."""

    groups: list[Group]
    """Their responses have a score and a judgment."""
    set_aside: list[tuple[Group, str]]
    counts: dict[str, int]


def targets(groups: Sequence[Group], said: Mapping[tuple[str, str], Sequence[Said]], how: SeedDataConfig) -> Targets:
    """Make EFT of ranked groups and what a judge said of their responses, over-common scores thinned.

    `said` maps (prompt, response text) to its judgments, a pass at each place.
    """
    if how.eft_targets == "ranked":
        return justified(groups, said)
    found = agreeing(groups, said, how.eft_agree)
    kept, common = thinned(found.groups)
    out = [(group, f"score {response['score']} is over-common") for group, response in common]
    return Targets(kept, found.set_aside + out, found.counts | {"over_common": len(common)})


_COUNTED = ("groups", "judgments", "readable", "passes", "passes_agreeing", "groups_agreeing")


def agreeing(groups: Iterable[Group], said: Mapping[tuple[str, str], Sequence[Said]], agree: str) -> Targets:
    """Take of each group the first pass whose readable scores agree with people's ranking (section 3.1.1).

    Ours, for the paper gives no test: `strict` = no pair is inverted and one at least is in order, `top` = the best
    has the highest score, and not all have it.
    """
    counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)
    taken: list[Group] = []
    out: list[tuple[Group, str]] = []
    for group in groups:
        judged = [said.get((group["prompt"], response["text"]), ()) for response in group["responses"]]
        passes = [_readable(group, one) for one in itertools.zip_longest(*judged, fillvalue=Said(None, ""))]
        right = [responses for responses in passes if _AGREES[agree](responses)]
        counts["groups"] += 1
        counts["judgments"] += sum(map(len, judged))
        counts["readable"] += sum(map(len, passes))
        counts["passes"] += len(passes)
        counts["passes_agreeing"] += len(right)
        counts["groups_agreeing"] += bool(right)
        if right:
            taken.append({**group, "responses": right[0]})
        else:
            out.append((group, "no pass agrees with the ranking" if any(passes) else "no judgment can be read"))
    return Targets(taken, out, counts)


def _readable(group: Group, one: Sequence[Said]) -> list[dict[str, Any]]:
    pairs = zip(group["responses"], one, strict=True)
    return [{**r, "score": _plain(s.score), "judgment": s.text.strip()} for r, s in pairs if s.score is not None]


def _plain(score: float) -> float:
    return int(score) if score == int(score) else score


def _strict(responses: Sequence[Mapping[str, Any]]) -> bool:
    margins = [a["score"] - b["score"] for a, b in itertools.permutations(responses, 2) if a["rank"] < b["rank"]]
    return min(margins, default=0) >= 0 and max(margins, default=0) > 0


def _top(responses: Sequence[Mapping[str, Any]]) -> bool:
    scores = [response["score"] for response in responses]
    best = min((response["rank"] for response in responses), default=0)
    of_best = [response["score"] for response in responses if response["rank"] == best]
    return bool(scores) and min(scores) < max(scores) == max(of_best)


_AGREES: dict[str, Callable[[Sequence[Mapping[str, Any]]], bool]] = {"strict": _strict, "top": _top}


def justified(groups: Iterable[Group], said: Mapping[tuple[str, str], Sequence[Said]]) -> Targets:
    """Put each response's score, which is its rank's, below a judge's justification; those without one are left out."""
    counts = {"groups": 0, "judgments": 0, "readable": 0}
    taken: list[Group] = []
    out: list[tuple[Group, str]] = []
    for group in groups:
        responses: list[dict[str, Any]] = []
        for response in group["responses"]:
            judged = said.get((group["prompt"], response["text"]), ())
            why = judged[0].text.rpartition(SCORE_LINE)[0].strip().rstrip("*").rstrip() if judged else ""
            counts["judgments"] += len(judged)
            if why:
                responses.append({**response, "judgment": f"{why}\n{SCORE_LINE}{response['score']}"})
        counts["groups"] += 1
        counts["readable"] += len(responses)
        if responses:
            taken.append({**group, "responses": responses})
        if lost := len(group["responses"]) - len(responses):
            out.append((group, f"{lost} response(s) without a justification"))
    return Targets(taken, out, counts)
