"""What the benchmarks ask models for: the shipped prompts, and the small model from its Python package."""

from pathlib import Path
from typing import Any

from srlm_core import data
from srlm_core.config import DEMO_MODEL, EngineConfig
from srlm_core.engines import resolve_dtype
from srlm_core.engines.models import resolve_model
from srlm_core.engines.protocol import Request, Sampling
from srlm_core.engines.tuning import tuned

CACHE = Path(__file__).parents[1] / "runs" / ".cache" / "models"


def small_model() -> Path:
    """Find the real 135M model."""
    return resolve_model(DEMO_MODEL, None, CACHE)


def engine(**settings: Any) -> EngineConfig:
    """Set up a vLLM engine of which two fit side by side, on a GPU too."""
    config = EngineConfig(kind="vllm", context=1024, kv_cache_gib=4.0, gpu_memory=0.4, compiled=False)
    return filled(config.model_copy(update=settings))


def filled(config: EngineConfig) -> EngineConfig:
    """Fill in what the settings leave open, as `open_engine` does."""
    return tuned(config.model_copy(update={"dtype": resolve_dtype(config)}))


def instructions() -> list[str]:
    """Read the shipped instructions."""
    return [row["instruction"] for row in data.load(data.SEED / "instructions.jsonl", "examples").rows]


def requests(n: int, max_tokens: int, seed: int, *, top_p: float = 0.9) -> list[Request]:
    """Make n chat requests, other ones for every seed, one sample each.

    None is ever repeated, however many are wanted: an engine that stays open knows the beginnings that it has read.
    """
    texts = instructions()
    places = (divmod(place, len(texts)) for place in range(seed * n, seed * n + n))
    asked = [f"Again, for the {time}. time: {texts[i]}" if time else texts[i] for time, i in places]
    sampling = Sampling(temperature=0.7, top_p=top_p, max_tokens=max_tokens)
    return [
        Request(f"{seed}-{i}", messages=({"role": "user", "content": text},), sampling=sampling, seed=256 * i)
        for i, text in enumerate(asked)
    ]
