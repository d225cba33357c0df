"""responses: the policy answers each prompt N times (arXiv:2401.10020 section 2.2, step 2)."""

import pyarrow as pa

from srlm_core import schemas
from srlm_core.config import SamplingConfig
from srlm_core.engines.protocol import Engine, Request, Sampling
from srlm_core.store import digest, seed_for

VERSION = 1

DATASETS = ("responses", "early_responses", "future_responses")
"""Where responses stand: the policy's, and those of other models that may take a side of a pair."""


def sampling(config: SamplingConfig) -> Sampling:
    """Translate the settings for the engine."""
    return Sampling(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)


def respond(
    prompts: pa.Table, engine: Engine, config: SamplingConfig, *, n: int, iteration: int, model: str, seed: int
) -> tuple[pa.Table, pa.Table]:
    """Sample n responses to each prompt; rows RESPONSES, in prompt order, and DROPS.

    A prompt that does not fit the context is dropped with its reason. Empty and repeated responses stay in the
    table, are named in the drops, and are judged by nobody.
    """
    asked = {row["prompt_id"]: row for row in prompts.to_pylist()}
    seeds = {prompt_id: seed_for(seed, iteration, "responses", prompt_id) for prompt_id in asked}
    requests = (
        Request(prompt_id, messages=tuple(row["messages"]), sampling=sampling(config), n=n, seed=seeds[prompt_id])
        for prompt_id, row in asked.items()
    )
    done = {(completion.request_id, completion.index): completion for completion in engine.generate(requests)}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []

    def drop(row_id: str, reason: str) -> None:
        drops.append({"id": row_id, "stage": "responses", "reason": reason, "iteration": iteration, "detail": None})

    for prompt_id in asked:
        seen: set[str] = set()
        for index in range(n):
            completion = done[prompt_id, index]
            if completion.finish_reason == "too_long":
                drop(prompt_id, "prompt_too_long")
                break
            response_id = digest(prompt_id, iteration, model, index, completion.text)
            rows.append(
                {
                    "response_id": response_id,
                    "prompt_id": prompt_id,
                    "iteration": iteration,
                    "index": index,
                    "response": completion.text,
                    "n_tokens": completion.n_tokens,
                    "finish_reason": completion.finish_reason,
                    "source": "policy",
                    "model": model,
                    "seed": seeds[prompt_id] + index,
                }
            )
            text = completion.text.strip()
            if not text or text in seen:
                drop(response_id, "duplicate" if text else "empty")
            seen.add(text)
    return schemas.table(rows, schemas.RESPONSES), schemas.table(drops, schemas.DROPS)


def judgeable(responses: pa.Table, drops: pa.Table) -> list[dict[str, object]]:
    """Return the responses that are worth judging: neither empty nor a repetition of another."""
    left_out = set(drops["id"].to_pylist())
    return [row for row in responses.to_pylist() if row["response_id"] not in left_out]
