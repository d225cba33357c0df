"""rewards: what a reward model gives responses (arXiv:2203.02155 section 3.5), and rankings that measure one."""

from collections.abc import Sequence

import pyarrow as pa

from srlm_core import schemas
from srlm_core.engines.protocol import Engine, ScoredText
from srlm_core.judgments import Task

VERSION = 1


def score(
    prompts: pa.Table, responses: pa.Table, engine: Engine, *, iteration: int, model: str
) -> tuple[pa.Table, pa.Table]:
    """Score each response that ended by itself; rows REWARDS in the responses' order, and DROPS.

    Null where prompt and response do not fit the context.
    """
    asked = {row["prompt_id"]: tuple(row["messages"]) for row in prompts.to_pylist()}
    ended = [row for row in responses.to_pylist() if row["finish_reason"] == "stop"]
    texts = [ScoredText(row["response_id"], asked[row["prompt_id"]], row["response"]) for row in ended]
    prompt_of = {row["response_id"]: row["prompt_id"] for row in ended}
    return _rows(texts, prompt_of, engine, iteration, model)


def score_ranked(tasks: Sequence[Task], engine: Engine, *, model: str) -> tuple[pa.Table, pa.Table]:
    """Score the responses of ranked groups, which measure the reward model as a judge; rows REWARDS, and DROPS."""
    texts = [ScoredText(task.target_id, ({"role": "user", "content": task.prompt},), task.response) for task in tasks]
    return _rows(texts, {task.target_id: task.prompt_id for task in tasks}, engine, 0, model)


def _rows(
    texts: Sequence[ScoredText], prompt_of: dict[str, str], engine: Engine, iteration: int, model: str
) -> tuple[pa.Table, pa.Table]:
    told = {scored.id: scored.reward for scored in engine.rewards(texts)}
    rows = [
        {
            "response_id": text.id, "prompt_id": prompt_of[text.id], "iteration": iteration, "model": model,
            "reward": told[text.id],
        }
        for text in texts
    ]  # fmt: skip
    drops = [
        {"id": row["response_id"], "stage": "rewards", "reason": "too_long", "iteration": iteration, "detail": model}
        for row in rows
        if row["reward"] is None
    ]
    return schemas.table(rows, schemas.REWARDS), schemas.table(drops, schemas.DROPS)


def known(rows: pa.Table) -> dict[str, float]:
    """Return response id to reward, where there is one."""
    return {row["response_id"]: row["reward"] for row in rows.to_pylist() if row["reward"] is not None}
