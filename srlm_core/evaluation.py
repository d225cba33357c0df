"""evaluation: is the judge better, is the policy better, and not only longer or more generous?

Every rate has its n and standard error; ties and unreadable judgments are counted, not hidden; comparisons run in both
orders and a disagreement is a tie. Definitions: arXiv:2401.10020 section 3.2 and table 4; tie rules are ours.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.stats import kendalltau, spearmanr

from srlm_core import judgments, schemas
from srlm_core.engines.protocol import Engine, Request
from srlm_core.length_control import length_controlled
from srlm_core.rates import Rate, rate
from srlm_core.store import digest

VERSION = 1
NEAR = 0.2
"""Two responses are of nearly equal length where the shorter lacks at most this share of the longer's characters."""


# --- the judge against held-out rankings ----------------------------------------------------------------------------


class Ranked(NamedTuple):
    """One response of a held-out group: its rank (0 = best), the judge's score (null: unreadable), its length."""

    rank: int
    score: float | None
    length: int


class GroupMeasure(NamedTuple):
    """What one prompt's group contributes."""

    n_pairs: int
    correct: int
    ties: int
    longer_correct: float
    n_near: int
    near_correct: int
    n_level: int
    level_longer: float
    exact: bool | None
    spearman: float | None
    kendall: float | None
    n_full: int
    full_and_best: int


def measure_group(group: Sequence[Ranked]) -> GroupMeasure:
    """Compare a judge's scores with the ranking of one prompt's responses.

    Pairs in which a score is missing are left out, and those of equal rank show the pull of length alone. Scores
    5, 4, 4, best first: 2 of 3 pairs correct, 1 tie, not exact, Spearman 0.866, tau-b 0.816.
    """
    pairs = itertools.combinations(sorted(group, key=lambda response: response.rank), 2)
    scored_pairs = [(a, b, a.score - b.score) for a, b in pairs if a.score is not None and b.score is not None]
    read = [(a, b, margin) for a, b, margin in scored_pairs if a.rank < b.rank]
    near = [margin for a, b, margin in read if abs(a.length - b.length) <= NEAR * max(a.length, b.length)]
    level = [
        margin if a.length > b.length else -margin
        for a, b, margin in scored_pairs
        if a.rank == b.rank and a.length != b.length
    ]
    scored = [response for response in group if response.score is not None]
    full = [response for response in scored if response.score == 5]
    best = min(response.rank for response in group)
    complete = len(scored) == len(group) and bool(read)
    exact = all(margin > 0 for _, _, margin in read) if complete else None
    spearman, kendall = _correlations(scored)
    return GroupMeasure(
        n_pairs=len(read),
        correct=sum(margin > 0 for _, _, margin in read),
        ties=sum(margin == 0 for _, _, margin in read),
        longer_correct=sum(0.5 if a.length == b.length else float(a.length > b.length) for a, b, _ in read),
        n_near=len(near),
        near_correct=sum(margin > 0 for margin in near),
        n_level=len(level),
        level_longer=sum(0.5 if margin == 0 else float(margin > 0) for margin in level),
        exact=exact,
        spearman=spearman,
        kendall=kendall,
        n_full=len(full),
        full_and_best=sum(response.rank == best for response in full),
    )


def _correlations(scored: Sequence[Ranked]) -> tuple[float | None, float | None]:
    """Spearman and tau-b of scores with the ranking; null where one side is constant."""
    goodness, scores = [-r.rank for r in scored], [r.score for r in scored]
    if len(set(goodness)) < 2 or len(set(scores)) < 2:
        return None, None
    return _statistic(spearmanr(goodness, scores)), _statistic(kendalltau(goodness, scores))


def _statistic(result: Any) -> float:
    # Any: scipy makes the class of its results while it is imported, so a type checker knows no field of it
    return float(result.statistic)


def measure_judge(groups: Sequence[Sequence[Ranked]], *, samples: int, seed: int) -> dict[str, Any]:
    """Return the paper's five figures and what stands beside them, with prompt-level bootstrap errors.

    Ties count as wrong in the headline; undefined correlations count as 0 in it, with the mean over the defined
    ones and their number beside. `longer_accuracy` is what always taking the longer response would reach on the same
    pairs, `pairwise_accuracy_near_length` the judge's on those whose lengths hardly tell (NEAR), and
    `longer_preferred_at_equal_rank` how often it scores the longer of two equally ranked higher (0.5: no pull).
    """
    measured = [measure_group(group) for group in groups]
    sums: dict[str, Callable[[Sequence[GroupMeasure]], tuple[float, int]]] = {
        "pairwise_accuracy": lambda m: (sum(g.correct for g in m), sum(g.n_pairs for g in m)),
        "pairwise_accuracy_tie_half": lambda m: (sum(g.correct + g.ties / 2 for g in m), sum(g.n_pairs for g in m)),
        "pairwise_accuracy_no_ties": lambda m: (sum(g.correct for g in m), sum(g.n_pairs - g.ties for g in m)),
        "tie_rate": lambda m: (sum(g.ties for g in m), sum(g.n_pairs for g in m)),
        "longer_accuracy": lambda m: (sum(g.longer_correct for g in m), sum(g.n_pairs for g in m)),
        "pairwise_accuracy_near_length": lambda m: (sum(g.near_correct for g in m), sum(g.n_near for g in m)),
        "longer_preferred_at_equal_rank": lambda m: (sum(g.level_longer for g in m), sum(g.n_level for g in m)),
        "exact_match": lambda m: (sum(g.exact or 0 for g in m), sum(g.exact is not None for g in m)),
        "five_best": lambda m: (sum(g.full_and_best for g in m), sum(g.n_full for g in m)),
        "spearman": lambda m: (sum(g.spearman or 0 for g in m), len(m)),
        "spearman_defined": lambda m: (sum(g.spearman or 0 for g in m), sum(g.spearman is not None for g in m)),
        "kendall": lambda m: (sum(g.kendall or 0 for g in m), len(m)),
        "kendall_defined": lambda m: (sum(g.kendall or 0 for g in m), sum(g.kendall is not None for g in m)),
    }
    result: dict[str, Any] = {name: _bootstrapped(measured, of, samples, seed)._asdict() for name, of in sums.items()}
    result["n_groups"] = len(measured)
    result["n_undefined"] = sum(g.spearman is None for g in measured)
    return result


def _bootstrapped(
    groups: Sequence[GroupMeasure], of: Callable[[Sequence[GroupMeasure]], tuple[float, int]], samples: int, seed: int
) -> Rate:
    """A ratio of sums over prompts, its standard error by resampling prompts."""
    per_group = np.array([of([group]) for group in groups], dtype=float).reshape(-1, 2)
    total, n = per_group.sum(axis=0) if len(per_group) else (0.0, 0)
    if not n:
        return Rate(None, None, 0)
    drawn = np.random.default_rng(seed).integers(0, len(groups), size=(samples, len(groups)))
    resampled = per_group[drawn].sum(axis=1)
    ratios = resampled[resampled[:, 1] > 0]
    return Rate(float(total / n), float((ratios[:, 0] / ratios[:, 1]).std()), int(n))


def group_tasks(groups: Iterable[Mapping[str, Any]]) -> list[judgments.Task]:
    """Lay out ranked groups for the judge, all responses of a prompt together; what stands twice is judged once."""
    asked = dict.fromkeys((group["prompt"], response["text"]) for group in groups for response in group["responses"])
    return [judgments.Task(response_key(prompt, text), digest(prompt), prompt, text) for prompt, text in asked]


def response_key(prompt: str, text: str) -> str:
    """Identify a response that a file brought."""
    return digest("held out", prompt, text)


def ranked(groups: Iterable[Mapping[str, Any]], scores: Mapping[str, float]) -> list[list[Ranked]]:
    """Join a judge's scores to ranked groups, by id."""
    return [
        [
            Ranked(r["rank"], scores.get(response_key(group["prompt"], r["text"])), len(r["text"]))
            for r in group["responses"]
        ]
        for group in groups
    ]


# --- judge health ---------------------------------------------------------------------------------------------------


def judge_health(rows: pa.Table, lengths: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Describe a set of judgments: readable rate, why not, histogram, entropy, what passes differ by, pull of length.

    `pass_agreement`: of two passes over a response, how often both say the same; 4, 4, 3 agree in 1 of 3 pairs.
    """
    verdicts: dict[str, list[float]] = defaultdict(list)
    reasons: Counter[str] = Counter()
    for row in rows.select(["target_id", "verdict", "unreadable_reason"]).to_pylist():
        if row["verdict"] is None:
            reasons[row["unreadable_reason"]] += 1
        else:
            verdicts[row["target_id"]].append(row["verdict"])
    read = [value for values in verdicts.values() for value in values]
    histogram = Counter(round(value) for value in read)
    shares = [count / len(read) for count in histogram.values()] if read else []
    means = {target: math.fsum(values) / len(values) for target, values in verdicts.items()}
    spreads = [float(np.std(values)) for values in verdicts.values() if len(values) > 1]
    return {
        "readable_rate": rate([1.0] * len(read) + [0.0] * reasons.total())._asdict(),
        "unreadable": dict(sorted(reasons.items())),
        "score": rate(list(means.values()))._asdict(),
        "histogram": {str(point): histogram.get(point, 0) for point in range(6)},
        "entropy_bits": sum(share * math.log2(1 / share) for share in shares) if read else None,
        "pass_agreement": rate([_agreement(values) for values in verdicts.values() if len(values) > 1])._asdict(),
        "spread_over_passes": math.fsum(spreads) / len(spreads) if spreads else None,
        "score_length_correlation": _length_pull(means, lengths or {}),
    }


def _agreement(values: Sequence[float]) -> float:
    pairs = list(itertools.combinations(values, 2))
    return sum(a == b for a, b in pairs) / len(pairs)


def _length_pull(means: Mapping[str, float], lengths: Mapping[str, int]) -> float | None:
    both = [(means[target], lengths[target]) for target in means if target in lengths]
    if len({score for score, _ in both}) < 2 or len({length for _, length in both}) < 2:
        return None
    return _statistic(spearmanr([score for score, _ in both], [length for _, length in both]))


# --- responses that try to win a score ------------------------------------------------------------------------------


def attack_tasks(attacks: Iterable[Mapping[str, Any]]) -> list[judgments.Task]:
    """Lay out each response twice: plain, and with the text that quotes scores or gives the judge orders."""
    tasks: list[judgments.Task] = []
    for attack in attacks:
        parts = [attack["response"], attack["attack"]]
        attacked = "\n\n".join(parts[::-1] if attack.get("position") == "before" else parts)
        for name, text in (("plain", attack["response"]), ("attacked", attacked)):
            tasks.append(judgments.Task(_attack_key(attack, name), digest(attack["prompt"]), attack["prompt"], text))
    return tasks


def _attack_key(attack: Mapping[str, Any], name: str) -> str:
    return digest("attack", attack["prompt"], attack["attack"], name)


def attack_shift(attacks: Sequence[Mapping[str, Any]], scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the mean shift in score that the attacks won, rubric points, and the shift of each form."""
    shifts: list[tuple[str, float]] = []
    for attack in attacks:
        plain, attacked = (scores.get(_attack_key(attack, name)) for name in ("plain", "attacked"))
        if plain is not None and attacked is not None:
            shifts.append((attack["form"], attacked - plain))
    forms = dict.fromkeys(form for form, _ in shifts)
    by_form = {form: rate([shift for name, shift in shifts if name == form]).value for form in forms}
    return {"shift": rate([shift for _, shift in shifts])._asdict(), "n_attacks": len(attacks), "by_form": by_form}


# --- head to head ---------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """Two models' answers to one prompt."""

    prompt_id: str
    prompt: str
    a_id: str
    a: str
    b_id: str
    b: str


def matches(prompts: pa.Table, a: pa.Table, b: pa.Table) -> list[Match]:
    """Join two models' first answers by prompt; prompts that either did not answer are left out."""
    answers = [{row["prompt_id"]: row for row in side.to_pylist() if row["index"] == 0} for side in (a, b)]
    return [
        Match(
            row["prompt_id"], schemas.conversation(row["messages"]),
            answers[0][row["prompt_id"]]["response_id"], answers[0][row["prompt_id"]]["response"],
            answers[1][row["prompt_id"]]["response_id"], answers[1][row["prompt_id"]]["response"],
        )
        for row in prompts.to_pylist()
        if row["prompt_id"] in answers[0] and row["prompt_id"] in answers[1]
    ]  # fmt: skip


def best_against_worst(groups: Iterable[Mapping[str, Any]]) -> list[Match]:
    """Lay out the best and the worst response of each ranked group as a match, `a` the best."""
    played: list[Match] = []
    for group in groups:
        in_order = sorted(group["responses"], key=lambda response: response["rank"])
        best, worst = (in_order[place]["text"] for place in (0, -1))
        keys = [response_key(group["prompt"], text) for text in (best, worst)]
        played.append(Match(digest(group["prompt"]), group["prompt"], keys[0], best, keys[1], worst))
    return played


def compare(played: Sequence[Match], engine: Engine, *, judge_name: str) -> tuple[pa.Table, pa.Table]:
    """Judge each match in both orders; rows JUDGMENTS (form pairwise, verdict = p(first is better)), and DROPS."""
    rubric = judgments.load_rubric("pairwise", justified=None)
    shown = {f"{order}/{match.prompt_id}": (match, order) for match in played for order in ("ab", "ba")}
    requests = [
        Request(key, messages=rubric.ask(prompt=match.prompt, **_in_order(match, order)), prefix=schemas.BETTER_LINE)
        for key, (match, order) in shown.items()
    ]
    told = {scores.request_id: scores for scores in engine.token_scores(requests, schemas.SHOWN)}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for key, (match, order) in shown.items():
        logprobs = told[key].logprobs
        if logprobs is None:
            why = "judge_prompt_too_long" if told[key].missing == "too_long" else "no_answer"
            row = {"id": digest(key, match.a_id, match.b_id), "stage": "evaluation", "reason": why}
            drops.append({**row, "iteration": 0, "detail": None})
            continue
        p_first = judgments.normalise(logprobs)[0]
        first, second = (match.a_id, match.b_id) if order == "ab" else (match.b_id, match.a_id)
        rows.append(
            {
                "judgment_id": digest(first, second, judge_name, rubric.identity),
                "target_id": match.a_id,
                "other_id": match.b_id,
                "first": first,
                "prompt_id": match.prompt_id,
                "iteration": 0,
                "index": 0 if order == "ab" else 1,
                "form": "pairwise",
                "reading": "expected",
                "judge": judge_name,
                "rubric": rubric.identity,
                "text": f"Better: A:{p_first:.3f} B:{1 - p_first:.3f}",
                "verdict": p_first,
                "unreadable_reason": None,
                "finish_reason": "stop",
                "seed": 0,
            }
        )
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


def _in_order(match: Match, order: str) -> dict[str, str]:
    return {"first": match.a, "second": match.b} if order == "ab" else {"first": match.b, "second": match.a}


def tally(rows: pa.Table, lengths: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Count wins, ties and losses of target against other; a verdict that changes with the order is a tie.

    120 wins, 80 ties, 56 losses of 256: 46.9 / 31.3 / 21.9 %, and 0.625 with ties as halves. `lengths`: characters of
    the answers, by id; `length_controlled` is what the 0.625 would be at equal length (srlm_core/length_control.py).
    """
    both = _in_both_orders(rows)
    points = [_point(orders[True], orders[False]) for orders in both.values()]
    flips = [float((orders[True] > 0.5) != (orders[False] > 0.5)) for orders in both.values()]
    result: dict[str, Any] = {
        "win": rate([float(point == 1) for point in points])._asdict(),
        "tie": rate([float(point == 0.5) for point in points])._asdict(),
        "lose": rate([float(point == 0) for point in points])._asdict(),
        "win_or_half_tie": rate(points)._asdict(),
        "flip_rate": rate(flips)._asdict(),
    }
    if lengths is not None:
        more = np.array([float(lengths[a] - lengths[b]) for a, b in both])
        result["longer"] = rate([float(characters > 0) for characters in more])._asdict()
        controlled = length_controlled(np.array(points), more, np.zeros(len(more)))
        result["length_controlled"] = Rate(*controlled, len(both) if controlled[0] is not None else 0)._asdict()
    return result


def _in_both_orders(rows: pa.Table) -> dict[tuple[str, str], dict[bool, float]]:
    """Return the chance of target being better, shown first (True) and shown second, where both were judged."""
    seen: dict[tuple[str, str], dict[bool, float]] = defaultdict(dict)
    for row in rows.to_pylist():
        a_first = row["first"] == row["target_id"]
        seen[row["target_id"], row["other_id"]][a_first] = row["verdict"] if a_first else 1 - row["verdict"]
    return {pair: orders for pair, orders in seen.items() if len(orders) == 2}


def results(rows: pa.Table) -> dict[tuple[str, str], float]:
    """Return what a judge made of each two answers: 1, the target's is better; 0; and 1/2, a tie or it cannot say."""
    return {pair: _point(orders[True], orders[False]) for pair, orders in _in_both_orders(rows).items()}


def agreement(first: Mapping[tuple[str, str], float], second: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Compare two judges' results (1, 1/2, 0) on the answers that both judged.

    `same`: the share on which they agree. `kappa`: Cohen's, 0 for what chance would do, null where a judge always says
    the same. Win, tie, lose, win against win, lose, lose, tie: 0.5 and 0.27.
    """
    both = [(first[pair], second[pair]) for pair in first if pair in second]
    same, n = rate([float(a == b) for a, b in both]), len(both)
    shares = [[Counter(judged)[result] / n for result in (0.0, 0.5, 1.0)] for judged in zip(*both, strict=True)]
    by_chance = math.fsum(a * b for a, b in zip(*shares, strict=True)) if shares else 1.0
    if same.value is None or any(max(judged) == 1 for judged in shares):
        return {"same": same._asdict(), "kappa": None}
    return {"same": same._asdict(), "kappa": (same.value - by_chance) / (1 - by_chance)}


def pull_of_order(rows: pa.Table) -> dict[str, Any]:
    """Say how a judge compares the best and the worst of held-out groups, and how much the order decides.

    `first_preferred` is 0.5 for a judge that does not mind the order, 1 for one that always takes what is shown first;
    `better_preferred` is right in both orders 1, in one 1/2.
    """
    found = tally(rows)
    first: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows.to_pylist():
        first[row["target_id"]].append(float(row["verdict"] > 0.5))
    both = [math.fsum(told) / 2 for told in first.values() if len(told) == 2]
    return {
        "first_preferred": rate(both)._asdict(), "better_preferred": found["win_or_half_tie"],
        "flip_rate": found["flip_rate"],
    }  # fmt: skip


def _point(p_shown_first: float, p_shown_second: float) -> float:
    """1, 0.5 or 0 for the model whose chance of being better is p when shown first and when shown second."""
    if p_shown_first > 0.5 and p_shown_second > 0.5:
        return 1.0
    if p_shown_first < 0.5 and p_shown_second < 0.5:
        return 0.0
    return 0.5
