"""Small tables for the tests."""

from collections.abc import Sequence
from typing import Any

from srlm_core import schemas


def prompts(*texts: str) -> Any:
    return schemas.table(
        (
            {
                "prompt_id": f"p{number}", "iteration": 1, "messages": [{"role": "user", "content": text}],
                "source": "self_instruct", "generator": "M1",
            }
            for number, text in enumerate(texts)
        ),
        schemas.PROMPTS,
    )  # fmt: skip


def responses(rows: Sequence[tuple[str, str, str]]) -> Any:
    """Rows of (prompt_id, text, finish_reason); ids r0, r1, … in order; index counts within the prompt."""
    seen: dict[str, int] = {}
    made = []
    for number, (prompt_id, text, finish_reason) in enumerate(rows):
        seen[prompt_id] = seen.get(prompt_id, -1) + 1
        made.append(
            {
                "response_id": f"r{number}", "prompt_id": prompt_id, "iteration": 1, "index": seen[prompt_id],
                "response": text, "n_tokens": len(text.split()), "finish_reason": finish_reason,
                "source": "policy", "model": "M1", "seed": 0,
            }
        )  # fmt: skip
    return schemas.table(made, schemas.RESPONSES)


def judgments(rows: Sequence[tuple[str, int, float | None]]) -> Any:
    """Rows of (target, index, verdict)."""
    return schemas.table(
        (
            {
                "judgment_id": f"j{number}", "target_id": target, "other_id": None, "first": None, "prompt_id": "p0",
                "iteration": 1, "index": index, "form": "pointwise", "reading": "text", "judge": "M1",
                "rubric": "additive", "text": "", "verdict": verdict,
                "unreadable_reason": None if verdict is not None else "no_score_line",
                "finish_reason": "stop", "seed": 0,
            }
            for number, (target, index, verdict) in enumerate(rows)
        ),
        schemas.JUDGMENTS,
    )  # fmt: skip
