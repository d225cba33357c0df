"""Direct Preference Optimisation on rankings that people made (arXiv:2305.18290): the plain baseline, offline.

No response is sampled and none is judged: one training on the best against the worst response of each ranked group.
"""

from srlm_core import prompts
from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Method, Step


def refuses(config: RunConfig) -> str | None:
    """Refuse more than one iteration: what is given is the same in each."""
    if config.iterations > 1:
        return (
            f"method=dpo trains once on what people ranked, got iterations={config.iterations}. Set iterations=1, "
            "and training.dpo.epochs for more passes."
        )
    return None


METHOD = Method(
    name="dpo",
    title="Direct Preference Optimisation, offline",
    source="arXiv:2305.18290",
    given=steps.ranked_groups,
    teaches_judging=False,
    refuses=refuses,
    steps=(
        Step("prompts", (), None, prompts.VERSION, ("prompts.target",), steps.take_ranked_prompts, takes_given=True),
        Step("pairs", ("prompts",), None, 1, (), steps.pair_ranked, takes_given=True),
    ),
)
