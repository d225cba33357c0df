"""Direct Preference Optimisation on rankings that people made (arXiv:2305.18290): the plain baseline, offline.

No response is sampled and none is judged: one training on the best against the worst response of each ranked group.
"""

import pyarrow as pa

from srlm_core import data, pairs, prompts, schemas, sources
from srlm_core.config import RunConfig
from srlm_core.methods.record import Given, Method, Shard, Step
from srlm_core.pairs import Side
from srlm_core.seed_data import SeedData
from srlm_core.store import digest


def given(config: RunConfig, seed: SeedData, t: int) -> Given:
    """Take the ranked groups that do not measure."""
    rows = data.spread(sources.first_of_each(seed.eft, "prompt"), config.prompts.target)
    return Given(len(rows), rows)


def refuses(config: RunConfig) -> str | None:
    """Refuse more than one iteration: what is given is the same in each."""
    if config.iterations > 1:
        return (
            f"method=dpo trains once on what people ranked, got iterations={config.iterations}. Set iterations=1, "
            "and training.dpo.epochs for more passes."
        )
    return None


def take_prompts(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Lay out the prompts of the ranked groups."""
    return prompts.given([row["prompt"] for row in shard.given], iteration=shard.iteration, source="eft")


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
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


METHOD = Method(
    name="dpo",
    title="Direct Preference Optimisation, offline",
    source="arXiv:2305.18290",
    given=given,
    teaches_judging=False,
    refuses=refuses,
    steps=(
        Step("prompts", (), None, prompts.VERSION, ("prompts.target",), take_prompts, takes_given=True),
        Step("pairs", ("prompts",), None, 1, (), pair, takes_given=True),
    ),
)
