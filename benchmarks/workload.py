"""What the benchmarks ask models for: the shipped prompts, and the small model from its Python package."""

import itertools
from pathlib import Path

from srlm_core import data
from srlm_core.config import DEMO_MODEL
from srlm_core.engines.models import resolve_model
from srlm_core.engines.protocol import Request, Sampling

CACHE = Path(__file__).parents[1] / "runs" / ".cache" / "models"


def small_model() -> Path:
    """Find the real 135M model."""
    return resolve_model(DEMO_MODEL, None, CACHE)


def instructions() -> list[str]:
    """Read the shipped instructions."""
    return [row["instruction"] for row in data.load(data.SEED / "instructions.jsonl", data.check_example).rows]


def requests(n: int, max_tokens: int, seed: int, *, top_p: float = 0.9) -> list[Request]:
    """Make n chat requests, other ones for every seed, one sample each."""
    asked = itertools.islice(itertools.cycle(instructions()), seed * n, seed * n + n)
    sampling = Sampling(temperature=0.7, top_p=top_p, max_tokens=max_tokens)
    return [
        Request(f"{seed}-{i}", messages=({"role": "user", "content": text},), sampling=sampling, seed=256 * i)
        for i, text in enumerate(asked)
    ]
