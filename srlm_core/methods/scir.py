"""SCIR-style: Self-Consistent Internal Rewards (idea: arXiv:2502.08922), a reconstruction.

A model has two opinions on which of two responses is better: what it says when asked, and what its log-ratios to a
reference imply. Pairs come without a label: at each step of training both are asked, DPO learns from the pairs on which
they agree, and a penalty makes them agree with confidence (engines/losses.py, `scir`). The paper's equations, settings
and results are not known to us: all but these two sentences is ours. Both can agree on a wrong rule, such as length;
only people's rankings show it.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from srlm_core import pairs, responses, schemas
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Measure, Method, Shard, Step
from srlm_core.pairs import Side
from srlm_core.rates import rate
from srlm_core.store import seed_for


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Draw two of the responses that may be chosen, either being the better one; rows PAIRS without labels, and DROPS.

    Who is drawn, and who stands first, depends on seed and prompt alone.
    """
    candidates: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for response in responses.judgeable(shard.inputs["responses"], shard.inputs["drops:responses"]):
        if pairs.may_be_chosen(response, shard.config.pairs):
            candidates[str(response["prompt_id"])].append(response)
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for prompt in shard.inputs["prompts"].to_pylist():
        asked = prompt["prompt_id"]
        found = sorted(candidates[asked], key=lambda response: response["index"])
        if len(found) < 2:
            drops.append(pairs.drop(prompt, "fewer_than_two_to_compare", iteration=shard.iteration))
        else:
            drawn = random.Random(seed_for(shard.config.seed, shard.iteration, "pairs", asked)).sample(found, 2)
            one, other = (Side(response["response"], response["response_id"]) for response in drawn)
            rows.append(pairs.row(prompt, one, other, iteration=shard.iteration, label=None))
    return schemas.table(rows, schemas.PAIRS), schemas.table(drops, schemas.DROPS)


def measures(made: Mapping[str, Iterable[pa.Table]], config: RunConfig) -> dict[str, Measure]:
    """Say how far the two of a pair differ in length: what both rewards could agree on instead of on what is better."""
    gaps: list[float] = []
    for part in made["pairs"]:
        for one, other in zip(part["chosen"].to_pylist(), part["rejected"].to_pylist(), strict=True):
            short, long = sorted((len(one), len(other)))
            gaps.append(1 - short / long)
    return {"length_gap": Measure("SCIR-style: what the shorter of two lacks of the longer, share", rate(gaps))}


METHOD = Method(
    name="scir",
    title="Self-Consistent Internal Rewards, SCIR-style",
    source="after the idea of arXiv:2502.08922",
    given=steps.own_prompts,
    compares=lambda config: True,
    labels=False,
    refuses=steps.refuses_one_response,
    measures=measures,
    steps=(
        steps.PROMPTS,
        steps.RESPONSES,
        Step("pairs", ("prompts", "responses"), None, 1, ("pairs",), pair),
    ),
)
