"""DICE: a model that DPO has trained is a reward, and ranks its own responses by it (arXiv:2406.09760).

r(y) = beta (log p_Mt(y | x) - log p_M1(y | x)), less alpha for each token: the first pairs' pull of length is inherited
otherwise. M1 is no such model yet, its reward is 0 everywhere: so the first iteration is DPO on what people ranked, and
later ones replay a part of it.
"""

from collections.abc import Callable, Mapping

import pyarrow as pa

from srlm_core import logprobs, pairs, prompts, responses, schemas
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Asked, Given, Method, Shard, Step
from srlm_core.seed_data import SeedData


def given(config: RunConfig, seed: SeedData, t: int) -> Given:
    """Take people's ranked groups at first, then own prompts."""
    return steps.ranked_groups(config, seed, t) if t == 1 else steps.own_prompts(config, seed, t)


def refuses(config: RunConfig) -> str | None:
    """Refuse to stop where the reward begins: before the second iteration it is 0 everywhere."""
    if config.iterations < 2:
        return (
            f"method=dice trains M2 on what people ranked, and then by M2's own reward, got iterations="
            f"{config.iterations}. Set iterations=2 or more; method=dpo is the first iteration alone."
        )
    return steps.refuses_one_response(config)


def make_prompts(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Ask what people ranked answers to at first, then have new prompts written."""
    return steps.take_ranked_prompts(shard) if shard.iteration == 1 else steps.write_prompts(shard)


def respond(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Sample N responses; at first there are people's."""
    return _nothing(schemas.RESPONSES) if shard.iteration == 1 else steps.respond(shard)


def score_by(role: str) -> Step:
    """Make the step in which one model scores the responses, where there are any."""

    def score(shard: Shard) -> tuple[pa.Table, pa.Table]:
        return _nothing(schemas.LOGPROBS) if shard.iteration == 1 else steps.score(shard, role)

    return Step(
        f"logprobs_{role}", ("prompts", "responses"), role, logprobs.VERSION, (), score,
        asks=after_the_first(steps.asks_for_scores),
    )  # fmt: skip


def after_the_first(asks: Callable[[RunConfig, int], Asked]) -> Callable[[RunConfig, int], Asked]:
    """Count nothing in the first iteration: people wrote and ranked all of it."""
    return lambda config, t: Asked() if t == 1 else asks(config, t)


def _nothing(schema: pa.Schema) -> tuple[pa.Table, pa.Table]:
    return schema.empty_table(), schemas.DROPS.empty_table()


def regularised(rewards: Mapping[str, float], n_tokens: Mapping[str, int], alpha: float) -> dict[str, float]:
    """Take alpha off for each token: 0.6, 0.2, -0.2 at 300, 100, 120 tokens and 0.001 become 0.3, 0.1, -0.32."""
    return {name: reward - alpha * n_tokens[name] for name, reward in rewards.items()}


def rewards(shard_of: Mapping[str, pa.Table], config: RunConfig) -> dict[str, float]:
    """Return response id to reward, where both models scored it."""
    now, first = shard_of["logprobs_policy"], shard_of["logprobs_sft"]
    ratios = logprobs.ratio(logprobs.known(now), logprobs.known(first))
    tokens = dict(zip(now["response_id"].to_pylist(), now["n_tokens"].to_pylist(), strict=True))
    implicit = {name: config.training.dpo.beta * value for name, value in ratios.items()}
    return regularised(implicit, tokens, config.dice.alpha)


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair the highest reward with the lowest, at first people's best with their worst; rows PAIRS, and DROPS."""
    if shard.iteration == 1:
        return steps.pair_ranked(shard)
    return pairs.best_and_worst(
        shard.inputs["prompts"], shard.inputs["responses"], rewards(shard.inputs, shard.config), shard.config.pairs,
        iteration=shard.iteration,
    )  # fmt: skip


SCORED = ("prompts", "responses", "logprobs_policy", "logprobs_sft")

METHOD = Method(
    name="dice",
    title="Bootstrapping with DPO's implicit rewards",
    source="arXiv:2406.09760",
    given=given,
    teaches_judging=False,
    refuses=refuses,
    steps=(
        Step(
            "prompts", (), "generator", prompts.VERSION, ("prompts",), make_prompts, in_order=True, takes_given=True,
            asks=after_the_first(steps.asks_for_prompts),
        ),
        Step(
            "responses", ("prompts",), "policy", responses.VERSION, ("responses",), respond,
            asks=after_the_first(steps.asks_for_responses),
        ),
        score_by("policy"),
        score_by("sft"),
        Step("pairs", SCORED, None, pairs.VERSION, ("pairs", "dice", "training.dpo.beta"), pair, takes_given=True),
    ),
)  # fmt: skip
