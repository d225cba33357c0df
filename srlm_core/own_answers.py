"""own_answers: does a judge like its own answers better than another judge likes them?

Nobody ranked a model's own answer among people's, so people's ranked responses to the same prompt are the yardstick.
What the model adds to the place that a frozen judge gives its answer there is its self-preference: two judges, the
same answer, the same responses around it. The measure is ours; the bias: arXiv:2404.13076, arXiv:2410.21819.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from srlm_core import judgments
from srlm_core.evaluation import response_key
from srlm_core.rates import rate


def place(own: float, others: Sequence[float]) -> float:
    """Return the share of other scores that one is above, equal ones as halves: 3 among 4, 3 and 1 has 0.5."""
    return sum(1.0 if own > other else 0.5 if own == other else 0.0 for other in others) / len(others)


def tasks(prompts: pa.Table, answers: pa.Table) -> list[judgments.Task]:
    """Lay out a model's answers for a judge; rows PROMPTS and RESPONSES. An empty one is judged by nobody."""
    return judgments.tasks(prompts, (row for row in answers.to_pylist() if row["response"].strip()))


def places(
    groups: Sequence[Mapping[str, Any]], own: Sequence[judgments.Task], scores: Mapping[str, float]
) -> dict[str, float]:
    """Place each own answer among the responses of its group: prompt to place, where there are scores to do it by."""
    answered = {task.prompt: scores[task.target_id] for task in own if task.target_id in scores}
    found: dict[str, float] = {}
    for group in groups:
        prompt = group["prompt"]
        keys = dict.fromkeys(response_key(prompt, response["text"]) for response in group["responses"])
        others = [scores[key] for key in keys if key in scores]
        if prompt in answered and others:
            found[prompt] = place(answered[prompt], others)
    return found


def measure(by_itself: Mapping[str, float], by_judge: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Compare the places that a model and a frozen judge give the same answers, prompt by prompt.

    Places 1, 0.5 by itself and 0.5, 0.5 by the judge: self_preference 0.25. Above 0, the model ranks itself higher.
    """
    found: dict[str, Any] = {"place": rate(list(by_itself.values()))._asdict()}
    if by_judge is not None:
        both = [(by_itself[prompt], by_judge[prompt]) for prompt in by_itself if prompt in by_judge]
        found["place_by_judge"] = rate([judged for _, judged in both])._asdict()
        found["self_preference"] = rate([mine - judged for mine, judged in both])._asdict()
    return found
