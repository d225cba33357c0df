"""Whether two sides trained the same thing: the loss of what came of it on the same rows, and the weights' distance."""

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core.config import EngineConfig
from srlm_core.engines import open_engine
from srlm_core.engines.protocol import ScoredText


def final_losses(models: Mapping[str, Path], rows: pa.Table, beta: float, logs: Path) -> dict[str, float]:
    """Return each model's loss on all rows: per token for SFT, mean over pairs for DPO with `start` as reference."""
    said = {name: _logprobs(path, rows, logs / f"{name}.engine.log") for name, path in models.items()}
    if "completion" in rows.column_names:
        return {name: round(token_loss(found), 4) for name, found in said.items()}
    return {name: round(dpo_loss(found, said["start"], beta), 4) for name, found in said.items()}


LogProbs = dict[str, tuple[float, int]]
"""Log-probability and tokens of each text, by `<row>/<column>`."""


def _logprobs(model: Path, rows: pa.Table, log: Path) -> LogProbs:
    asked = [
        ScoredText(f"{place}/{column}", tuple(row["prompt"]), row[column][0]["content"])
        for place, row in enumerate(rows.to_pylist())
        for column in row.keys() & {"completion", "chosen", "rejected"}
    ]
    with open_engine(EngineConfig(kind="transformers", context=2048, dtype="float32"), model, log=log) as engine:
        found = list(engine.logprobs(asked))
    return {one.id: (one.logprob, one.n_tokens) for one in found if one.logprob is not None}


def token_loss(found: LogProbs) -> float:
    """Mean of -log p over all tokens."""
    return -math.fsum(logprob for logprob, _ in found.values()) / sum(tokens for _, tokens in found.values())


def dpo_loss(found: LogProbs, reference: LogProbs, beta: float) -> float:
    """Mean of -log sigmoid(beta times how much more than the reference the model prefers the chosen response)."""
    gain = {text: logprob - reference[text][0] for text, (logprob, _) in found.items()}
    pairs = {text.partition("/")[0] for text in found}
    margins = [beta * (gain[f"{pair}/chosen"] - gain[f"{pair}/rejected"]) for pair in pairs]
    return math.fsum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def distances(models: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Hold how far ours and theirs end apart against how far two seeds of one side do.

    `models` are `start` and `<side>, seed <n>`. Shares of the way that their models went from the start on average.
    """
    weights = {name: _weights(path) for name, path in models.items()}
    start = weights.pop("start")
    way = statistics.fmean(_apart(found, start) for name, found in weights.items() if name.startswith("theirs"))
    shares: dict[str, list[float]] = {}
    for one, other in itertools.combinations(weights, 2):
        sides = {name.partition(",")[0] for name in (one, other)}
        what = "ours to theirs" if len(sides) == 2 else f"{sides.pop()}, two seeds"
        shares.setdefault(what, []).append(_apart(weights[one], weights[other]) / way)
    return {
        what: {
            "mean": round(statistics.fmean(found), 3), "lowest": round(min(found), 3), "highest": round(max(found), 3),
            "n": len(found),
        }
        for what, found in shares.items()
    }  # fmt: skip


def _weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _apart(one: Any, other: Any) -> float:
    return math.sqrt(
        sum(float((one[name].float() - other[name].float()).square().sum()) for name in one.keys() & other.keys())
    )
