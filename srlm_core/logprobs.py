"""logprobs: how probable a model holds responses, and how far two models' rankings of them agree.

CREAM's intrinsic reward (arXiv:2410.12735) is r(y) = log p_M(y | x) - log p_M0(y | x), natural logarithms summed over
the response's tokens and the one that ends it: no length normalisation, no prompt for a judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from scipy.stats import kendalltau, spearmanr

from srlm_core import schemas
from srlm_core.engines.protocol import Engine, ScoredText

VERSION = 1

Agreement = Literal["kendall", "spearman", "top_order"]


def score(
    prompts: pa.Table, responses: pa.Table, engine: Engine, *, iteration: int, model: str
) -> tuple[pa.Table, pa.Table]:
    """Score each response that ended by itself once; rows LOGPROBS in the responses' order, and DROPS.

    A response that was cut has no end whose probability could be asked. Null where prompt and response do not fit the
    context.
    """
    asked = {row["prompt_id"]: tuple(row["messages"]) for row in prompts.to_pylist()}
    ended = [row for row in responses.to_pylist() if row["finish_reason"] == "stop"]
    texts = [ScoredText(row["response_id"], asked[row["prompt_id"]], row["response"]) for row in ended]
    told = {scored.id: scored for scored in engine.logprobs(texts)}
    rows = [
        {
            "response_id": row["response_id"],
            "prompt_id": row["prompt_id"],
            "iteration": iteration,
            "model": model,
            "logprob": told[row["response_id"]].logprob,
            "n_tokens": told[row["response_id"]].n_tokens,
        }
        for row in ended
    ]
    drops = [
        {"id": row["response_id"], "stage": "logprobs", "reason": "too_long", "iteration": iteration, "detail": model}
        for row in rows
        if row["logprob"] is None
    ]
    return schemas.table(rows, schemas.LOGPROBS), schemas.table(drops, schemas.DROPS)


def known(rows: pa.Table) -> dict[str, float]:
    """Return response id to log-probability, nats, where there is one."""
    return {row["response_id"]: row["logprob"] for row in rows.to_pylist() if row["logprob"] is not None}


def per_token(rows: pa.Table) -> dict[str, float]:
    """Return response id to mean log-probability of a token, nats."""
    tokens = dict(zip(rows["response_id"].to_pylist(), rows["n_tokens"].to_pylist(), strict=True))
    return {name: value / tokens[name] for name, value in known(rows).items()}


def ratio(over: Mapping[str, float], under: Mapping[str, float]) -> dict[str, float]:
    """Return the log-ratio of those that both models scored: the reward, nats."""
    return {name: value - under[name] for name, value in over.items() if name in under}


def correlation(now: Sequence[float], before: Sequence[float], by: Agreement) -> float | None:
    """Correlate two rankings of the same responses, from -1 to 1; null where one is constant, or there is one response.

    Raw values, not ranks: what is tied is tied (tau-b; (1, 1, 0) and (2, 1, 0): 0.816), whatever the order of rows.
    `top_order`: 1 where both the best and the worst are the same ones, else -1.
    """
    if len(set(now)) < 2 or len(set(before)) < 2:
        return None
    if by == "top_order":
        ends = [(of.index(max(of)), of.index(min(of))) for of in (list(now), list(before))]
        return 1.0 if ends[0] == ends[1] else -1.0
    found: Any = kendalltau(now, before) if by == "kendall" else spearmanr(now, before)
    return float(found.statistic)
