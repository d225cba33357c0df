"""CREAM, Consistency-Regularised Self-Rewarding (arXiv:2410.12735): a label counts as far as two models agree on it.

Nobody judges: a response's reward is how much more probable M_t holds it than M0 did. Where M_{t-1} ranks the responses
otherwise, the pair is taken with less confidence: C l(Delta) + (1 - C) l(-Delta), a soft label.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from srlm_core import logprobs, pairs, schemas
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Measure, Method, Shard, Step
from srlm_core.rates import Rate, rate

CONSISTENCY = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("correlation", pa.float64()),
        pa.field("label", pa.float64()),
    ]
)
"""n: responses that both models ranked; correlation: of the two rankings, -1 to 1, null where it is undefined; label:
the C of the prompt's pair, 0 to 1, null where no prompt of the iteration has one."""


def score_by(role: str) -> Step:
    """Make the step in which one model scores the responses; no response is scored twice by one model."""

    def score(shard: Shard) -> tuple[pa.Table, pa.Table]:
        if role == "previous" and shard.models["previous"] == shard.models["base"]:
            return schemas.LOGPROBS.empty_table(), schemas.DROPS.empty_table()  # M0 has scored them as the base
        return steps.score(shard, role)

    reads = ("prompts", "responses")
    return Step(f"logprobs_{role}", reads, role, logprobs.VERSION, (), score, asks=steps.asks_for_scores)


def rewards(shard_of: Mapping[str, pa.Table]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the rewards by M_t and by M_{t-1}, nats, by response id.

    Where M_{t-1} is M0 itself its ratio is 0 everywhere, and it ranks by the mean log-probability of a token.
    """
    base = shard_of["logprobs_base"]
    before = logprobs.ratio(logprobs.known(shard_of["logprobs_previous"]), logprobs.known(base))
    now = logprobs.ratio(logprobs.known(shard_of["logprobs_policy"]), logprobs.known(base))
    return now, before if shard_of["logprobs_previous"].num_rows else logprobs.per_token(base)


def weigh(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Correlate the rankings of each prompt and settle the labels; rows CONSISTENCY, no DROPS.

    C = (correlation + 1) / 2. With `cream.per = dataset` every label is the mean C of the iteration; with `pair` each
    is its own prompt's, and the mean where that is undefined.
    """
    how = shard.config.cream
    found = [
        {"prompt_id": prompt, "iteration": shard.iteration, "n": n, "correlation": value}
        for prompt, n, value in _correlations(shard.whole, how.consistency)
    ]
    known = [(row["correlation"] + 1) / 2 for row in found if row["correlation"] is not None]
    mean = rate(known).value
    rows = [
        {**row, "label": mean if how.per == "dataset" or row["correlation"] is None else (row["correlation"] + 1) / 2}
        for row in found
    ]
    return schemas.table(rows, CONSISTENCY), schemas.DROPS.empty_table()


def _correlations(
    whole: Mapping[str, Iterable[pa.Table]], by: logprobs.Agreement
) -> Iterator[tuple[str, int, float | None]]:
    for part in _shards(whole):
        now, before = rewards(part)
        ranked: dict[str, list[str]] = defaultdict(list)
        for name, prompt in _prompt_of(part["responses"]).items():
            if name in now and name in before:
                ranked[prompt].append(name)
        for prompt in part["prompts"]["prompt_id"].to_pylist():
            names = ranked[prompt]
            values = [now[name] for name in names], [before[name] for name in names]
            yield prompt, len(names), logprobs.correlation(*values, by)


def _shards(whole: Mapping[str, Iterable[pa.Table]]) -> Iterator[dict[str, pa.Table]]:
    for parts in zip(*(whole[name] for name in SCORED), strict=True):
        yield dict(zip(SCORED, parts, strict=True))


def _prompt_of(rows: pa.Table) -> dict[str, str]:
    return dict(zip(rows["response_id"].to_pylist(), rows["prompt_id"].to_pylist(), strict=True))


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair the highest reward by M_t with the lowest, the label being C; rows PAIRS, and DROPS."""
    rows = shard.inputs["consistency"].to_pylist()
    made, drops = pairs.best_and_worst(
        shard.inputs["prompts"], shard.inputs["responses"], rewards(shard.inputs)[0], shard.config.pairs,
        iteration=shard.iteration, labels={row["prompt_id"]: row["label"] for row in rows},
    )  # fmt: skip
    return made, drops


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say how far the two models agree, and whether the reward is one for length."""
    rows: list[dict[str, Any]] = [row for part in made["consistency"] for row in part.to_pylist()]
    known = [(row["correlation"] + 1) / 2 for row in rows if row["correlation"] is not None]
    return {
        "consistency": Measure("C: agreement of M_t with the one before", rate(known)),
        "consistency_below_half": Measure("… prompts on which they disagree, C < 0.5", rate([c < 0.5 for c in known])),
        "consistency_undefined": Measure(
            "… prompts on which nothing can be said", rate([row["correlation"] is None for row in rows])
        ),
        "reward_length_correlation": Measure("reward with length, mean rank correlation", _pull_of_length(made)),
    }


def _pull_of_length(made: Mapping[str, Iterable[pa.Table]]) -> Rate:
    found: list[float] = []
    for part in _shards(made):
        now, _ = rewards(part)
        by_prompt: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in part["responses"].to_pylist():
            if row["response_id"] in now:
                by_prompt[row["prompt_id"]].append((now[row["response_id"]], row["n_tokens"]))
        for both in by_prompt.values():
            reward, length = zip(*both, strict=True)
            value = logprobs.correlation(reward, length, "spearman")
            found += [] if value is None else [value]
    return rate(found)


SCORED = ("prompts", "responses", "logprobs_policy", "logprobs_base", "logprobs_previous")

METHOD = Method(
    name="cream",
    title="Consistency-Regularised Self-Rewarding",
    source="arXiv:2410.12735",
    given=steps.own_prompts,
    teaches_judging=False,
    refuses=steps.refuses_one_response,
    measures=measures,
    steps=(
        steps.PROMPTS,
        steps.RESPONSES,
        score_by("policy"),
        score_by("base"),
        score_by("previous"),
        Step("consistency", SCORED, None, 1, ("cream",), weigh, gathers=True),
        Step("pairs", (*SCORED, "consistency"), None, pairs.VERSION, ("pairs",), pair),
    ),
)
