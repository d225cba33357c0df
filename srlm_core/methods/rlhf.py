"""RLHF with a Bradley-Terry reward model (InstructGPT, arXiv:2203.02155), offline: the reward model is the judge.

A reward model learns what people ranked, once; in each iteration it scores M_t's responses, and DPO trains on the best
against the worst, in the place of PPO.
"""

from collections.abc import Iterable, Mapping

import pyarrow as pa

from srlm_core import pairs, responses, rewards, schemas
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Measure, Method, Shard, Step
from srlm_core.rates import rate


def score(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Have the reward model score the responses; rows REWARDS, and DROPS."""
    asked = responses.judgeable(shard.inputs["responses"], shard.inputs["drops:responses"])
    return rewards.score(
        shard.inputs["prompts"], schemas.table(asked, schemas.RESPONSES), shard.engine,
        iteration=shard.iteration, model=shard.models["reward"],
    )  # fmt: skip


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair the response of the highest reward with that of the lowest; rows PAIRS, and DROPS."""
    return pairs.best_and_worst(
        shard.inputs["prompts"], shard.inputs["responses"], rewards.known(shard.inputs["rewards"]),
        shard.config.pairs, iteration=shard.iteration,
    )  # fmt: skip


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say what the rewards are, and how often the longer of a pair is the chosen one."""
    found = [reward for part in made["rewards"] for reward in rewards.known(part).values()]
    longer = [
        float(len(row["chosen"]) > len(row["rejected"]))
        for part in made["pairs"]
        for row in part.to_pylist()
        if len(row["chosen"]) != len(row["rejected"])
    ]
    return {
        "reward_mean": Measure("mean reward of a response", rate(found)),
        "chosen_longer": Measure("pairs whose longer response was chosen", rate(longer)),
    }


METHOD = Method(
    name="rlhf",
    title="Reinforcement learning from human feedback, offline",
    source="arXiv:2203.02155",
    given=steps.own_prompts,
    teaches_judging=False,
    refuses=steps.refuses_one_response,
    measures=measures,
    steps=(
        steps.REWARD_MODEL,
        steps.PROMPTS,
        steps.RESPONSES,
        Step("rewards", ("prompts", "responses"), "reward", rewards.VERSION, (), score, asks=steps.asks_for_scores),
        Step("pairs", ("prompts", "responses", "rewards"), None, pairs.VERSION, ("pairs",), pair),
    ),
)
