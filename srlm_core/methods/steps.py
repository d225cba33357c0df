"""The steps that methods share: Self-Rewarding's (arXiv:2401.10020 section 2.2), which others replace or add to."""

from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa

from srlm_core import comparisons, data, judgments, logprobs, pairs, prompts, responses, schemas, sources, training
from srlm_core.config import RunConfig
from srlm_core.methods.record import Asked, Given, Measure, Shard, Step, Training
from srlm_core.pairs import Side
from srlm_core.rates import rate
from srlm_core.seed_data import SeedData
from srlm_core.store import digest


def own_prompts(config: RunConfig, seed: SeedData, t: int) -> Given:
    """Take the user's own prompts of iteration t; each is used in one iteration only."""
    wanted = config.prompts.target
    n_own = round(wanted * config.prompts.file_share)
    own = seed.own_prompts[(t - 1) * n_own : t * n_own]
    short = f"iteration {t}: {n_own} prompts wanted from {config.prompts.file}, {len(own)} are left in it"
    return Given(wanted, [{"prompt": text} for text in own], short if len(own) < n_own else "")


def ranked_groups(config: RunConfig, seed: SeedData, t: int) -> Given:
    """Take the ranked groups that do not measure."""
    rows = data.spread(sources.first_of_each(seed.eft, "prompt"), config.prompts.target)
    return Given(len(rows), rows)


def refuses_one_response(config: RunConfig) -> str | None:
    """Refuse a single response: best and worst would be one."""
    if config.responses.n < 2:
        return (
            f"method={config.method} pairs the best response with the worst, got responses.n={config.responses.n}. "
            "Set responses.n=2 or more."
        )
    return None


ASSUMED_STEPS = 5
"""Steps of a response, where each is judged; for the plan."""


def asks_for_prompts(config: RunConfig, t: int) -> Asked:
    """Count one completion for each prompt that the user's file does not give; how many are kept is not known here."""
    how = config.prompts
    return Asked((1 - how.file_share) / how.per_request, how.sampling.max_tokens * how.per_request)


def asks_for_responses(config: RunConfig, t: int) -> Asked:
    """Count N completions."""
    return Asked(config.responses.n, config.responses.sampling.max_tokens)


def asks_for_judgments(config: RunConfig, t: int, responses: int = 0) -> Asked:
    """Count K judgments of each response (none given: N), or of each of its steps, written or read off."""
    how, n = config.judgments, responses or config.responses.n
    each = ASSUMED_STEPS if how.steps else 1
    return Asked(n * how.k * each, how.sampling.max_tokens if how.justified else 0, n)


def asks_for_scores(config: RunConfig, t: int) -> Asked:
    """Count N responses that are read."""
    return Asked(config.responses.n, 0, config.responses.n)


def asks_for_comparisons(config: RunConfig, t: int, responses: int = 0) -> Asked:
    """Count each two responses (none given: of N) in both orders; both are read, and explained where that is asked."""
    n, how = responses or config.responses.n, config.judgments
    written = how.sampling.max_tokens if how.comparisons_justified else 0
    return Asked(comparisons.ORDERS * n * (n - 1) / 2, written, comparisons.ORDERS * n * (n - 1))


def write_prompts(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Take the user's own prompts, then have the generator write the rest."""
    config = shard.config.prompts
    own, own_drops = prompts.take(
        [row["prompt"] for row in shard.given],
        shard.kept,
        iteration=shard.iteration,
        source=f"dataset:{config.file}",
        wanted=shard.wanted,
    )
    written, drops = prompts.write(
        shard.engine,
        shard.kept,
        config,
        wanted=shard.wanted - len(shard.given),
        iteration=shard.iteration,
        shard=shard.number,
        generator=shard.models["generator"],
        seed=shard.config.seed,
    )
    return pa.concat_tables([own, written]), pa.concat_tables([own_drops, drops])


def respond(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Sample N responses to each prompt of the shard from the policy."""
    config = shard.config.responses
    return responses.respond(
        shard.inputs["prompts"],
        shard.engine,
        config.sampling,
        n=config.n,
        iteration=shard.iteration,
        model=shard.policy,
        seed=shard.config.seed,
    )


def judge(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Judge each response K times; passes that exist already are kept and only the missing ones are made."""
    present = shard.present if shard.present is not None else schemas.JUDGMENTS.empty_table()
    first = 1 + max(present["index"].to_pylist(), default=-1)
    work = judgments.tasks(
        shard.inputs["prompts"], responses.judgeable(shard.inputs["responses"], shard.inputs["drops:responses"])
    )
    made, drops = judgments.judge(
        work,
        shard.engine,
        shard.config.judgments,
        iteration=shard.iteration,
        judge_name=shard.models["judge"],
        seed=shard.config.seed,
        first=first,
    )
    order = {task.target_id: place for place, task in enumerate(work)}
    rows = sorted(present.to_pylist() + made.to_pylist(), key=lambda row: (order[row["target_id"]], row["index"]))
    return schemas.table(rows, schemas.JUDGMENTS), drops


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Average the verdicts and pair best with worst."""
    config = shard.config
    scores = judgments.scores(shard.inputs["judgments"], k=config.judgments.k, required=config.judgments.required)
    return pairs.best_and_worst(
        shard.inputs["prompts"],
        shard.inputs["responses"],
        {response_id: score.mean for response_id, score in scores.items()},
        config.pairs,
        iteration=shard.iteration,
    )


def take_ranked_prompts(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Lay out the prompts of the ranked groups."""
    return prompts.given([row["prompt"] for row in shard.given], iteration=shard.iteration, source="eft")


def pair_ranked(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Prefer the best-ranked response to the worst-ranked, of equals the first in the file; rows PAIRS, and DROPS.

    A group of one rank never comes here: the reader sets it aside, it prefers nothing.
    """
    ranked = {row["prompt"]: row["responses"] for row in shard.given}
    rows: list[dict[str, object]] = []
    for prompt in shard.inputs["prompts"].to_pylist():
        asked = schemas.prompt_text(prompt["messages"])
        best = min(ranked[asked], key=lambda response: response["rank"])
        worst = max(ranked[asked], key=lambda response: response["rank"])
        sides = [Side(side["text"], digest("human", asked, side["text"])) for side in (best, worst)]
        rows.append(pairs.row(prompt, *sides, iteration=shard.iteration))
    return schemas.table(rows, schemas.PAIRS), schemas.DROPS.empty_table()


def score(shard: Shard, role: str) -> tuple[pa.Table, pa.Table]:
    """Ask a model how probable it holds the responses; rows LOGPROBS, and DROPS."""
    asked = responses.judgeable(shard.inputs["responses"], shard.inputs["drops:responses"])
    return logprobs.score(
        shard.inputs["prompts"], schemas.table(asked, schemas.RESPONSES), shard.engine,
        iteration=shard.iteration, model=shard.models[role],
    )  # fmt: skip


def rank_by_people(config: RunConfig, seed: SeedData, whole: Mapping[str, Iterable[pa.Table]]) -> Iterator[pa.Table]:
    """Lay out what people ranked, for a reward model; rows RANKINGS."""
    yield training.rankings(seed.eft)


def compare(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Have the judge compare each two responses of a prompt, in both orders."""
    worth_judging = responses.judgeable(shard.inputs["responses"], shard.inputs["drops:responses"])
    return comparisons.compare(
        comparisons.all_pairs(shard.inputs["prompts"], worth_judging), shard.engine,
        judge_name=shard.models["judge"], iteration=shard.iteration, stage="comparisons",
        **comparisons.as_asked(shard.config),
    )  # fmt: skip


def measure_comparisons(parts: Iterable[pa.Table]) -> dict[str, Measure]:
    """Say how much the order decides where the judge compares, and how many comparisons are missing."""
    flips: list[float] = []
    first: list[float] = []
    missing: list[float] = []
    for rows in parts:
        flips += comparisons.flips(rows)
        first += [float(verdict > 0.5) for verdict in rows["verdict"].to_pylist() if verdict not in (None, 0.5)]
        found = comparisons.win_rates(rows)
        missing += [0.0] * (len(found.p) // 2) + [1.0] * found.missing
    return {
        "comparison_flip_rate": Measure("comparisons that the order decides", rate(flips)),
        "comparison_first_wins": Measure("… the one shown first wins", rate(first)),
        "comparison_missing": Measure("… judged in one order only, left out", rate(missing)),
    }


REWARD_MODEL = Training(
    "reward", "reward", (), rank_by_people, init_from="sft", once=True, named=lambda config: config.rlhf.reward_model
)
PROMPTS = Step(
    "prompts", (), "generator", prompts.VERSION, ("prompts",), write_prompts, in_order=True, takes_given=True,
    asks=asks_for_prompts,
)  # fmt: skip
RESPONSES = Step(
    "responses", ("prompts",), "policy", responses.VERSION, ("responses",), respond, asks=asks_for_responses
)
JUDGMENTS = Step(
    "judgments", ("prompts", "responses"), "judge", judgments.VERSION, judgments.SETTINGS, judge,
    texts=judgments.texts, passes=lambda config: config.judgments.k, asks=asks_for_judgments,
)  # fmt: skip
COMPARISONS = Step(
    "comparisons", ("prompts", "responses"), "judge", comparisons.VERSION, (), compare, texts=comparisons.texts,
    passes=lambda config: comparisons.ORDERS, asks=asks_for_comparisons,
)  # fmt: skip
PAIRS = Step(
    "pairs", ("prompts", "responses", "judgments"), None, pairs.VERSION,
    ("pairs", "judgments.k", "judgments.min_valid"), pair,
)  # fmt: skip
