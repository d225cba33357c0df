"""Direct Nash Optimization, its practical form (arXiv:2404.03715): pairs of a large margin, a reference among them.

Of each prompt the policy's own responses and a reference answer are judged alike; every good one is chosen over every
one that is worse by enough, whoever wrote it. The loss is DPO's with M_t as reference; earlier pairs are replayed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import comparisons, judgments, pairs, prompts, responses, schemas, sources
from srlm_core.config import DnoConfig, RunConfig
from srlm_core.errors import NothingLeft
from srlm_core.methods import steps
from srlm_core.methods.record import Asked, Given, Measure, Method, Shard, Step
from srlm_core.pairs import Side
from srlm_core.rates import rate
from srlm_core.seed_data import SeedData
from srlm_core.store import digest, seed_for

_EPSILON = 1e-9
"""Means of verdicts may miss a margin by their last bit."""

TYPES = ("reference over own", "own over reference", "own over own")
"""Who wrote the chosen and the rejected response: T>S, S>T and S>S of the paper's table 4."""


# --- what is asked and answered -------------------------------------------------------------------------------------


def given(config: RunConfig, seed: SeedData, t: int) -> Given:
    """Take the instructions of iteration t with their answers, drawn; each is used in one iteration only.

    Raises NothingLeft, before the first iteration, where the last one would have none.
    """
    rows, wanted = sources.first_of_each(seed.ift, "instruction"), config.prompts.target
    rows.sort(key=lambda row: seed_for(config.seed, "dno", row["instruction"]))
    if len(rows) <= (config.iterations - 1) * wanted:
        raise NothingLeft(
            f"method=dno uses each instruction of seed_data.ift once: expected more than {config.iterations - 1} "
            f"iterations × prompts.target={wanted}, got {len(rows)}. Lower prompts.target, or give more instructions."
        )
    own = rows[(t - 1) * wanted : t * wanted]
    short = f"iteration {t}: {wanted} instructions wanted of seed_data.ift, {len(own)} are left"
    return Given(len(own), own, short if len(own) < wanted else "")


def refuses(config: RunConfig) -> str | None:
    """Refuse settings of another way to choose pairs, and prompts that have no reference."""
    if config.prompts.file:
        return (
            f"method=dno asks the instructions of seed_data.ift, which have answers, got prompts.file="
            f"{config.prompts.file}. Give them as seed_data.ift, and leave prompts.file out."
        )
    for name, value in (("min_margin", config.pairs.min_margin), ("length_control", config.pairs.length_control)):
        if value:
            return f"method=dno pairs by the margins under dno, got pairs.{name}={value}. Leave it out."
    return None


def by_win_rates(config: RunConfig) -> bool:
    """Whether responses are compared two by two, not scored."""
    return config.dno.judge_by == "win_rate"


def take_prompts(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Ask what the references answer."""
    return prompts.given([row["instruction"] for row in shard.given], iteration=shard.iteration, source="ift")


def respond(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Sample N responses to each prompt, and put the reference beside them, its index after theirs.

    A response that is the reference word for word is left out as its duplicate.
    """
    own, drops = steps.respond(shard)
    answer = {row["instruction"]: row["response"] for row in shard.given}
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for row in own.to_pylist():
        said[row["prompt_id"]][row["response_id"]] = row["response"].strip()
    dropped = set(drops["id"].to_pylist())
    references: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    for prompt in shard.inputs["prompts"].to_pylist():
        prompt_id, text = prompt["prompt_id"], answer[schemas.prompt_text(prompt["messages"])]
        if prompt_id in said:
            references.append(_reference(prompt_id, text, shard))
        for name, own_text in said[prompt_id].items():
            if own_text == text.strip() and name not in dropped:
                row = {"id": name, "stage": "responses", "reason": "same_as_the_reference"}
                copies.append({**row, "iteration": shard.iteration, "detail": None})
    return (
        pa.concat_tables([own, schemas.table(references, schemas.RESPONSES)]),
        pa.concat_tables([drops, schemas.table(copies, schemas.DROPS)]),
    )


def _reference(prompt_id: str, text: str, shard: Shard) -> dict[str, Any]:
    return {
        "response_id": digest("reference", prompt_id, text),
        "prompt_id": prompt_id,
        "iteration": shard.iteration,
        "index": shard.config.responses.n,
        "response": text,
        "n_tokens": None,
        "finish_reason": "stop",
        "source": "reference",
        "model": "",
        "seed": 0,
    }


# --- what it is worth -----------------------------------------------------------------------------------------------


def judge(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Score responses and references, each by itself, where it goes by scores."""
    if shard.config.dno.judge_by == "win_rate":
        return schemas.JUDGMENTS.empty_table(), schemas.DROPS.empty_table()
    return steps.judge(shard)


def compare(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Compare each two of them in both orders, where it goes by win rates."""
    if shard.config.dno.judge_by == "score":
        return schemas.JUDGMENTS.empty_table(), schemas.DROPS.empty_table()
    return steps.compare(shard)


def worth(shard_of: Mapping[str, pa.Table], config: RunConfig) -> dict[str, float]:
    """Return response id to score, 0 to 5, or to win rate, 0 to 1, where there is one."""
    if config.dno.judge_by == "win_rate":
        return comparisons.win_rates(shard_of["comparisons"]).mean
    scores = judgments.scores(shard_of["judgments"], k=config.judgments.k, required=config.judgments.required)
    return {name: score.mean for name, score in scores.items()}


# --- which are paired -----------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A response that is worth something, and what it may be in a pair."""

    name: str
    worth: float
    is_reference: bool = False
    may_be_chosen: bool = True
    may_be_rejected: bool = True


def large_margins(of: Sequence[Candidate], how: DnoConfig) -> list[tuple[Candidate, Candidate]]:
    """Pair each positive with all that are worse by enough (section 5.1); (chosen, rejected), in the order given.

    Scores: reference 5, own 6, 5, 4, 3, 3; positive from 5, leads of 2 and 1: ten pairs, two of them of the reference.
    """
    return [
        (chosen, rejected)
        for chosen in of
        if _is_positive(chosen, how) and (chosen.is_reference or not how.restrictive)
        for rejected in of
        if rejected.may_be_rejected and chosen.worth - rejected.worth >= _lead(chosen, how) - _EPSILON
    ]


def _is_positive(one: Candidate, how: DnoConfig) -> bool:
    return one.may_be_chosen and (how.judge_by == "win_rate" or one.worth >= how.min_positive - _EPSILON)


def _lead(chosen: Candidate, how: DnoConfig) -> float:
    if how.judge_by == "win_rate":
        return how.win_margin
    return how.reference_margin if chosen.is_reference else how.own_margin


def capped(
    found: Sequence[tuple[Candidate, Candidate]], most: int | None, *, seed: int
) -> list[tuple[Candidate, Candidate]]:
    """Take the `most` pairs of the largest lead, drawn of equal ones: a prompt of many does not outweigh the others."""

    def rank(pair: tuple[Candidate, Candidate]) -> tuple[float, int]:
        chosen, rejected = pair
        return -round(chosen.worth - rejected.worth, 9), seed_for(seed, "dno pairs", chosen.name, rejected.name)

    kept = set(sorted(found, key=rank)[:most])
    return [pair for pair in found if pair in kept]


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair by large margins; rows PAIRS, and DROPS. What runs in a loop or was cut is never chosen."""
    config, said, worths = shard.config, shard.inputs["responses"].to_pylist(), worth(shard.inputs, shard.config)
    text = {row["response_id"]: row["response"] for row in said}
    of: dict[str, list[Candidate]] = defaultdict(list)
    for row in sorted(said, key=lambda row: row["index"]):
        name = row["response_id"]
        if name in worths:
            may_be = pairs.may_be_chosen(row, config.pairs), pairs.may_be_rejected(row, config.pairs)
            of[row["prompt_id"]].append(Candidate(name, worths[name], row["source"] == "reference", *may_be))
    rows: list[dict[str, Any]] = []
    drops: list[dict[str, object]] = []
    for prompt in shard.inputs["prompts"].to_pylist():
        candidates = of[prompt["prompt_id"]]
        taken = capped(large_margins(candidates, config.dno), config.dno.max_pairs_per_prompt, seed=config.seed)
        for chosen, rejected in taken:
            sides = (Side(text[side.name], side.name, side.worth) for side in (chosen, rejected))
            rows.append(pairs.row(prompt, *sides, iteration=shard.iteration))
        if not taken:
            drops.append(pairs.drop(prompt, _why_no_pair(candidates, config.dno), iteration=shard.iteration))
    return schemas.table(rows, schemas.PAIRS), schemas.table(drops, schemas.DROPS)


def _why_no_pair(candidates: Sequence[Candidate], how: DnoConfig) -> str:
    if len(candidates) < 2:
        return "fewer_than_two_scored"
    if not any(one.may_be_chosen for one in candidates):
        return "none_may_be_chosen"
    return "margin_too_small" if any(_is_positive(one, how) for one in candidates) else "no_positive"


# --- what it costs ----------------------------------------------------------------------------------------------------


def asks_for_judgments(config: RunConfig, t: int) -> Asked:
    """Count the reference among the responses."""
    by_score = config.dno.judge_by == "score"
    return steps.asks_for_judgments(config, t, config.responses.n + 1) if by_score else Asked()


def asks_for_comparisons(config: RunConfig, t: int) -> Asked:
    """Count the reference among the responses."""
    by_win_rate = config.dno.judge_by == "win_rate"
    return steps.asks_for_comparisons(config, t, config.responses.n + 1) if by_win_rate else Asked()


def pairs_of_a_prompt(config: RunConfig) -> float:
    """Return all pairs that there could be: of n responses and a reference n (n + 1) / 2."""
    n = config.responses.n
    most = n if config.dno.restrictive else n * (n + 1) // 2
    return float(min(most, config.dno.max_pairs_per_prompt or most))


# --- what is measured -----------------------------------------------------------------------------------------------


def pair_types(made: pa.Table, said: pa.Table) -> list[str]:
    """Return the type of each pair, one of TYPES: by its ids, who wrote its sides stands in the responses."""
    source = dict(zip(said["response_id"].to_pylist(), said["source"].to_pylist(), strict=True))
    who = {name: "reference" if of == "reference" else "own" for name, of in source.items()}
    sides = zip(made["chosen_id"].to_pylist(), made["rejected_id"].to_pylist(), strict=True)
    return [f"{who[chosen]} over {who[rejected]}" for chosen, rejected in sides]


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say which pairs there are, how many of a prompt, and how the policy stands to the references."""
    types: list[str] = []
    per_prompt: list[float] = []
    worths: dict[bool, list[float]] = {True: [], False: []}
    best: list[float] = []
    for part in _shards(made):
        types += pair_types(part["pairs"], part["responses"])
        count = Counter(part["pairs"]["prompt_id"].to_pylist())
        per_prompt += [float(count[name]) for name in part["prompts"]["prompt_id"].to_pylist()]
        for reference, own in _worths(part, config):
            worths[True] += reference
            worths[False] += own
            if reference and own:
                lead = max(own) - reference[0]
                best.append(0.5 if abs(lead) <= _EPSILON else float(lead > 0))
    by_type = {
        f"pairs_{name.replace(' ', '_')}": Measure(f"… {name}, share of pairs", rate([one == name for one in types]))
        for name in TYPES
    }
    what = "win rate" if config.dno.judge_by == "win_rate" else "score"
    return {
        "pairs_per_prompt": Measure("pairs of a prompt", rate(per_prompt)),
        **by_type,
        "worth_of_references": Measure(f"references, mean {what}", rate(worths[True])),
        "worth_of_own": Measure(f"own responses, mean {what}", rate(worths[False])),
        "best_own_wins": Measure("… the best of a prompt above its reference, equal ones as halves", rate(best)),
        **(steps.measure_comparisons(made["comparisons"]) if config.dno.judge_by == "win_rate" else {}),
    }


def _shards(made: Mapping[str, Iterable[pa.Table]]) -> Iterator[dict[str, pa.Table]]:
    names = (*JUDGED, "pairs")
    for parts in zip(*(made[name] for name in names), strict=True):
        yield dict(zip(names, parts, strict=True))


def _worths(part: Mapping[str, pa.Table], config: RunConfig) -> Iterator[tuple[list[float], list[float]]]:
    """What the reference (none or one) and the own responses of each prompt are worth."""
    known = worth(part, config)
    of: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row in part["responses"].select(["response_id", "prompt_id", "source"]).to_pylist():
        if row["response_id"] in known:
            of[row["prompt_id"]][row["source"] != "reference"].append(known[row["response_id"]])
    yield from of.values()


JUDGED = ("prompts", "responses", "judgments", "comparisons")

METHOD = Method(
    name="dno",
    title="Direct Nash Optimization",
    source="arXiv:2404.03715",
    given=given,
    refuses=refuses,
    compares=by_win_rates,
    scores_win_rates=by_win_rates,
    measures=measures,
    pairs_of_a_prompt=pairs_of_a_prompt,
    steps=(
        Step("prompts", (), None, prompts.VERSION, ("prompts.target",), take_prompts, takes_given=True),
        Step("responses", ("prompts",), "policy", responses.VERSION, ("responses",), respond, takes_given=True,
             asks=steps.asks_for_responses),
        Step(
            "judgments", ("prompts", "responses"), "judge", judgments.VERSION, (*judgments.SETTINGS, "dno.judge_by"),
            judge, texts=judgments.texts, passes=lambda config: config.judgments.k * (config.dno.judge_by == "score"),
            asks=asks_for_judgments,
        ),
        Step(
            "comparisons", ("prompts", "responses"), "judge", comparisons.VERSION, ("dno.judge_by",), compare,
            texts=comparisons.texts, passes=lambda config: comparisons.ORDERS * (config.dno.judge_by == "win_rate"),
            asks=asks_for_comparisons,
        ),
        Step("pairs", JUDGED, None, 1, ("pairs", "dno", "judgments.k", "judgments.min_valid"), pair),
    ),
)  # fmt: skip
