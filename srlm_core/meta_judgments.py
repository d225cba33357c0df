"""meta_judgments: the judge compares its own judgments, and ranks them (Meta-Rewarding, arXiv:2407.19594).

Of each prompt the response is taken whose verdicts vary most; all its judgments meet in both orders. What the place in
the prompt decides is weighed out, and the winners are ranked by Bradley and Terry's model.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from srlm_core import judgments, schemas
from srlm_core.config import MetaConfig, RunConfig
from srlm_core.engines.protocol import Engine, Request, Sampling
from srlm_core.judgments import Rubric, Verdict
from srlm_core.store import digest, seed_for

VERSION = 1
CHOICES = ("A", "B")
WINNER_LINE = "Winner: Judgment "

_WINNER = re.compile(r"\bwinner\W{0,3}[:=][\s*_\[(]*judge?ment[\s*_\[(]*([AB])\b", re.IGNORECASE)


# --- which judgments meet -------------------------------------------------------------------------------------------


class Contest(NamedTuple):
    """The judgments of one response that are compared, as rows of JUDGMENTS, in the order of their passes."""

    prompt_id: str
    judgments: list[dict[str, Any]]


def contests(rows: pa.Table, *, k: int, seed: int) -> tuple[list[Contest], dict[str, str]]:
    """Take of each prompt the response whose readable verdicts vary most (population variance), at random of equals.

    Judgments that say the same, word for word, are one. Also returns prompt id to the reason why it has none.
    """
    read: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows.to_pylist():
        of = read[row["prompt_id"]]
        if row["verdict"] is not None and row["index"] < k:
            of[row["target_id"]].append(row)
    found: list[Contest] = []
    why_not: dict[str, str] = {}
    for prompt_id, by_response in read.items():
        most = max(by_response, key=lambda target: _variation(by_response[target], seed), default=None)
        different = {row["text"].strip(): row for row in reversed(by_response[most])} if most else {}
        if len(different) < 2:
            why_not[prompt_id] = "fewer_than_two_judgments" if most is None else "judgments_all_equal"
        else:
            found.append(Contest(prompt_id, sorted(different.values(), key=lambda row: row["index"])))
    return found, why_not


def _variation(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[float, int]:
    verdicts = [row["verdict"] for row in rows]
    mean = math.fsum(verdicts) / len(verdicts)
    variance = math.fsum((verdict - mean) ** 2 for verdict in verdicts) / len(verdicts)
    return round(variance, 9), seed_for(seed, "most varied", rows[0]["target_id"])


# --- comparing them -------------------------------------------------------------------------------------------------


def load_rubrics(config: RunConfig) -> tuple[Rubric, Rubric]:
    """Return what the judge was asked, and what it is asked of two of its judgments."""
    judged = judgments.load_rubric(config.judgments.rubric, justified=config.judgments.justified)
    asks_with = ("rubric", "prompt", "response", "first", "second")
    written = config.meta.reading == "text"
    return judged, judgments.load_rubric(config.meta.rubric, justified=written, kind="meta_", asks_with=asks_with)


def texts(config: RunConfig) -> list[str]:
    """Identify the templates that a comparison is asked with."""
    return [rubric.identity for rubric in load_rubrics(config)]


def parse_winner(text: str, finish_reason: str) -> Verdict:
    """Read who wins: 1 for judgment A, 0 for B. The last line that names a winner binds; else null with a reason."""
    if finish_reason != "stop":
        return Verdict(None, judgments.why_not_whole(finish_reason))
    named = _WINNER.findall(text)
    return Verdict(float(named[-1].upper() == "A"), None) if named else Verdict(None, "no_winner_line")


class _Meeting(NamedTuple):
    """Two judgments in one order."""

    first: dict[str, Any]
    second: dict[str, Any]


def judge(
    of: Sequence[Contest],
    prompts: pa.Table,
    responses: pa.Table,
    engine: Engine,
    config: RunConfig,
    *,
    iteration: int,
    judge_name: str,
) -> tuple[pa.Table, pa.Table]:
    """Compare all judgments of each contest in both orders; rows JUDGMENTS and DROPS.

    Form `meta`; target and other are judgment ids in the order of their passes, verdict = p(the one shown first wins).
    """
    judged, rubric = load_rubrics(config)
    asked = {row["prompt_id"]: schemas.conversation(row["messages"]) for row in prompts.to_pylist()}
    said = dict(zip(responses["response_id"].to_pylist(), responses["response"].to_pylist(), strict=True))
    requests: list[Request] = []
    meetings: dict[str, _Meeting] = {}
    for contest in of:
        texts = {
            "rubric": judged.template, "prompt": asked[contest.prompt_id],
            "response": said[contest.judgments[0]["target_id"]],
        }  # fmt: skip
        for first, second in itertools.permutations(contest.judgments, 2):
            meeting = digest(first["judgment_id"], second["judgment_id"], iteration, judge_name, rubric.identity)
            meetings[meeting] = _Meeting(first, second)
            messages = rubric.ask(**texts, first=first["text"], second=second["text"])
            seed = seed_for(config.seed, "meta", meeting)
            requests.append(Request(meeting, messages=messages, sampling=_sampling(config.meta), seed=seed))
    read = _read_text if config.meta.reading == "text" else _read_expected
    told = {name: (text, verdict, reason) for name, text, verdict, reason in read(requests, engine)}
    rows = [
        _row(meetings[request.id], request, told[request.id], config.meta.reading, rubric, judge_name, iteration)
        for request in requests
        if request.id in told
    ]
    too_long = [request.id for request in requests if request.id not in told]
    drops = [
        {
            "id": name,
            "stage": "meta_judgments",
            "reason": "judge_prompt_too_long",
            "iteration": iteration,
            "detail": None,
        }
        for name in too_long
    ]
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


def _sampling(config: MetaConfig) -> Sampling:
    return Sampling(config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens)


_Read = Iterator[tuple[str, str, Verdict, str]]


def _read_text(requests: Sequence[Request], engine: Engine) -> _Read:
    """The paper's reading: an explanation, and its last line names the winner."""
    for done in engine.generate(requests):
        if done.finish_reason != "too_long":
            yield done.request_id, done.text, parse_winner(done.text, done.finish_reason), done.finish_reason


def _read_expected(requests: Sequence[Request], engine: Engine) -> _Read:
    """p(A wins) from the token after the winner line's beginning, renormalised over A and B; nothing is written."""
    asked = [Request(request.id, messages=request.messages, prefix=WINNER_LINE) for request in requests]
    for scores in engine.token_scores(asked, CHOICES):
        if scores.logprobs is not None:
            p = judgments.read_off(judgments.normalise(scores.logprobs)[0])
            yield scores.request_id, f"{WINNER_LINE}A:{p:.3f} B:{1 - p:.3f}", Verdict(p, None), "stop"
        elif scores.missing != "too_long":
            yield scores.request_id, "", Verdict(None, "no_answer"), scores.missing


def _row(
    meeting: _Meeting,
    request: Request,
    told: tuple[str, Verdict, str],
    reading: str,
    rubric: Rubric,
    judge_name: str,
    iteration: int,
) -> dict[str, object]:
    text, verdict, finish_reason = told
    target, other = sorted(meeting, key=lambda row: row["index"])
    return {
        "judgment_id": request.id,
        "target_id": target["judgment_id"],
        "other_id": other["judgment_id"],
        "first": meeting.first["judgment_id"],
        "prompt_id": target["prompt_id"],
        "iteration": iteration,
        "index": int(meeting.first is other),
        "form": "meta",
        "reading": reading,
        "judge": judge_name,
        "rubric": rubric.identity,
        "text": text,
        "verdict": verdict.value,
        "unreadable_reason": verdict.unreadable_reason,
        "finish_reason": finish_reason,
        "seed": request.seed,
    }


# --- who won --------------------------------------------------------------------------------------------------------


class Battles(NamedTuple):
    """The comparisons of one response's judgments: won[m, n] where m was shown first and n second, +1, -1 or 0."""

    ids: list[str]
    won: np.ndarray
    """Shape [judgments, judgments]; 0 is a tie or nothing that could be read."""


def battles(rows: pa.Table) -> dict[str, Battles]:
    """Lay out verdicts as battles, by prompt id; p above 1/2 is a win of the one shown first."""
    found: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    columns = (rows[name].to_pylist() for name in ("prompt_id", "target_id", "other_id", "first", "verdict"))
    for prompt_id, target, other, first, verdict in zip(*columns, strict=True):
        outcome = 0 if verdict is None else (verdict > 0.5) - (verdict < 0.5)
        found[prompt_id][first, other if first == target else target] = outcome
    result: dict[str, Battles] = {}
    for prompt_id, outcomes in found.items():
        ids = list(dict.fromkeys(name for meeting in outcomes for name in meeting))
        place = {name: number for number, name in enumerate(ids)}
        won = np.zeros((len(ids), len(ids)))
        for (first, second), outcome in outcomes.items():
            won[place[first], place[second]] = outcome
        result[prompt_id] = Battles(ids, won)
    return result


def position_wins(verdicts: Iterable[float | None]) -> tuple[int, int]:
    """Count the wins of what was shown first, and of what was shown second."""
    counts = Counter((verdict > 0.5) - (verdict < 0.5) for verdict in verdicts if verdict is not None)
    return counts[1], counts[-1]


def battle_matrix(won: np.ndarray, first_wins: int, second_wins: int) -> np.ndarray:
    """B[m, n] = w1 [m, shown first, beats n] + w2 [m, shown second, beats n]; w1 = W2 / (W1 + W2), w2 = W1 / (W1 + W2).

    W1, W2: wins of the first and second place over all comparisons of the iteration; a rare win counts more. 4 and 1
    make 0.2 and 0.8. No wins at all: zeros. Shapes [..., judgments, judgments].
    """
    total = first_wins + second_wins
    if not total:
        return np.zeros_like(won)
    return (second_wins * (won > 0) + first_wins * (won < 0).swapaxes(-1, -2)) / total


def elo(wins: np.ndarray, regularisation: float) -> np.ndarray:
    """Rate by maximum likelihood: argmax_e sum B[m, n] log sigmoid(e_m - e_n) - regularisation / 2 sum e^2; sums to 0.

    Shapes: [..., judgments, judgments] gives [..., judgments]. The second term is ours: without it a judgment that wins
    all, or none, has no finite rating. It makes the problem strictly concave, and Newton's method finds its only
    solution.
    """
    ratings = np.zeros(wins.shape[:-1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(ratings[..., None, :] - ratings[..., :, None]))  # of m against n
        surprise = wins * (1 - chance)
        gradient = surprise.sum(-1) - surprise.sum(-2) - regularisation * ratings
        if np.abs(gradient).max(initial=0.0) < 1e-10:
            break
        weight = (wins + wins.swapaxes(-1, -2)) * chance * (1 - chance)
        curvature = np.eye(wins.shape[-1]) * (weight.sum(-1) + regularisation)[..., None] - weight
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        longest = np.abs(step).max(-1, keepdims=True)
        ratings = ratings + step * np.minimum(1.0, 2.0 / np.maximum(longest, 1e-9))  # a long step may overshoot
    return ratings
