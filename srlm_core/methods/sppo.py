"""Self-Play Preference Optimization (arXiv:2405.00675): what beats the other responses most against what does least.

A judge compares each two responses of a prompt, in both orders. A pair's scores are mean win rates, and its loss draws
each log-ratio towards (win rate - 1/2) / beta: how much better, not only which.
"""

import pyarrow as pa

from srlm_core import comparisons, pairs
from srlm_core.methods import steps
from srlm_core.methods.record import Method, Shard, Step


def pair(shard: Shard) -> tuple[pa.Table, pa.Table]:
    """Pair the highest mean win rate with the lowest (section 4); rows PAIRS, and DROPS."""
    found = comparisons.win_rates(shard.inputs["comparisons"])
    return pairs.best_and_worst(
        shard.inputs["prompts"], shard.inputs["responses"], found.mean, shard.config.pairs, iteration=shard.iteration
    )


METHOD = Method(
    name="sppo",
    title="Self-Play Preference Optimization",
    source="arXiv:2405.00675",
    given=steps.own_prompts,
    teaches_judging=False,
    refuses=steps.refuses_one_response,
    compares=lambda config: True,
    scores_win_rates=lambda config: True,
    measures=lambda made, config: steps.measure_comparisons(made["comparisons"]),
    steps=(
        steps.PROMPTS,
        steps.RESPONSES,
        steps.COMPARISONS,
        Step("pairs", ("prompts", "responses", "comparisons"), None, pairs.VERSION, ("pairs",), pair),
    ),
)
