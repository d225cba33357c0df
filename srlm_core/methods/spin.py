"""SPIN, Self-Play Fine-Tuning (arXiv:2401.01335): people's answer is chosen, the model's own is rejected.

There is no judge, and people's answers are the ceiling: once the two cannot be told apart nothing more is learnt. The
loss is DPO's with M_t as reference and beta as the paper's lambda (section 4.1).
"""

import pyarrow as pa

from srlm_core import data, pairs, prompts, schemas, sources
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Given, Method, Shard, Step
from srlm_core.pairs import Side
from srlm_core.seed_data import SeedData
from srlm_core.store import digest


def given(config: RunConfig, seed: SeedData, t: int) -> Given:
    """Take the instructions that M1 learnt from, the same in each iteration (algorithm 1)."""
    rows = data.spread(sources.first_of_each(seed.ift, "instruction"), config.prompts.target)
    return Given(len(rows), rows)


def refuses(config: RunConfig) -> str | None:
    """Refuse several responses: the method compares one with people's."""
    if config.responses.n != 1:
        return (
            f"method=spin samples one response to each prompt, got responses.n={config.responses.n}. Set responses.n=1."
        )
    return None


def take_prompts(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Ask what people were asked."""
    return prompts.given([row["instruction"] for row in shard.given], iteration=shard.iteration, source="ift")


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Prefer people's answer to the model's own; rows PAIRS, in prompt order, and DROPS.

    A response that was cut has no end, which would give it away, and one that is people's own teaches nothing.
    """
    human = {row["instruction"]: row["response"] for row in shard.given}
    own = {row["prompt_id"]: row for row in shard.inputs["responses"].to_pylist()}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for prompt in shard.inputs["prompts"].to_pylist():
        asked, said = schemas.prompt_text(prompt["messages"]), own.get(prompt["prompt_id"])
        reason = _why_no_pair(said, human[asked])
        if said is None or reason:
            drops.append(pairs.drop(prompt, reason or "no_response", iteration=shard.iteration))
        else:
            chosen = Side(human[asked], digest("human", asked, human[asked]))
            rejected = Side(said["response"], said["response_id"])
            rows.append(pairs.row(prompt, chosen, rejected, iteration=shard.iteration))
    return schemas.table(rows, schemas.PAIRS), schemas.table(drops, schemas.DROPS)


def _why_no_pair(said: dict[str, str] | None, human: str) -> str | None:
    if said is None:
        return "no_response"
    if said["finish_reason"] != "stop":
        return "cut"
    if not said["response"].strip():
        return "empty"
    return "same_as_the_human" if said["response"].strip() == human.strip() else None


METHOD = Method(
    name="spin",
    title="Self-Play Fine-Tuning",
    source="arXiv:2401.01335",
    given=given,
    teaches_judging=False,
    refuses=refuses,
    steps=(
        Step("prompts", (), None, prompts.VERSION, ("prompts.target",), take_prompts, takes_given=True),
        steps.RESPONSES,
        Step("pairs", ("prompts", "responses"), None, 1, (), pair, takes_given=True),
    ),
)
