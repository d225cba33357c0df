"""Self-Rewarding Language Models (arXiv:2401.10020).

The model writes new prompts, answers each N times, judges its own answers K times under an additive rubric, and is
trained by DPO on best against worst; the better model does it again, as writer, as answerer and as judge.
"""

from srlm_core.methods import steps
from srlm_core.methods.record import Method

METHOD = Method(
    name="self_rewarding",
    title="Self-Rewarding Language Models",
    source="arXiv:2401.10020",
    given=steps.own_prompts,
    refuses=steps.refuses_one_response,
    steps=(steps.PROMPTS, steps.RESPONSES, steps.JUDGMENTS, steps.PAIRS),
)
