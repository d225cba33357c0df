"""Nucleus sampling without sorting the vocabulary, against no nucleus, and against the engine's own."""

from typing import NamedTuple

from benchmarks.bare import Asked, Bare
from benchmarks.sides import Comparison, arithmetic, in_turn
from benchmarks.workload import requests, small_model
from srlm_core.config import EngineConfig
from srlm_core.engines import resolve_dtype
from srlm_core.engines.models import describe


class Size(NamedTuple):
    sequences: int
    tokens: int


SIZES = {"cpu": Size(128, 48), "gpu": Size(512, 256)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Draw the same number of tokens for the same requests, T = 0.7, with p = 0.9 and without."""
    config = EngineConfig(kind="vllm", context=1024, max_sequences=size.sequences, kv_cache_gib=4.0)
    config = config.model_copy(update={"dtype": resolve_dtype(config)})
    model = small_model()
    what = f"{size.sequences} sequences, T = 0.7, p = 0.9"
    with Bare(config, model) as bare:

        def rate(nucleus: str, r: int) -> float:
            done = bare.ask(Asked(requests(size.sequences, size.tokens, r), nucleus, ends=False, fresh=True))
            return done.tokens / done.seconds

        rate("ours", rounds)  # the first steps after a start are slower
        flops = arithmetic(size.sequences)
        limit = flops / (2 * describe(model).parameters)
        none = Comparison(
            f"nucleus: {what}", "ours", "no top-p", "tok/s", "at least", 0.9,
            limit=limit, limit_is=f"layers' products at {flops / 1e9:.0f} GFLOP/s",
        )  # fmt: skip
        theirs = Comparison(f"nucleus: {what}", "ours", "vLLM's own top-p", "tok/s", "at least", 1.0)
        return [
            in_turn(none, lambda r: rate("ours", r), lambda r: rate("none", r), rounds),
            in_turn(theirs, lambda r: rate("ours", r), lambda r: rate("vllm", r), rounds),
        ]
