"""Nucleus sampling without sorting the vocabulary, against no nucleus, and against the engine's own."""

from typing import NamedTuple

from benchmarks.bare import Asked, Bare
from benchmarks.sides import Comparison, arithmetic, in_turn
from benchmarks.workload import engine, requests, small_model
from srlm_core.engines.models import describe


class Size(NamedTuple):
    sequences: int
    tokens: int


SIZES = {"cpu": Size(128, 48), "gpu": Size(512, 256)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Draw the same number of tokens for the same requests, T = 0.7, with p = 0.9 and without."""
    config, model = engine(max_sequences=size.sequences), small_model()
    what = f"{size.sequences} sequences, T = 0.7, p = 0.9"
    with Bare(config, model) as bare:

        def rate(nucleus: str, r: int) -> float:
            done = bare.ask(Asked(requests(size.sequences, size.tokens, r), nucleus, ends=False, fresh=True))
            return done.tokens / done.seconds

        rate("ours", rounds)  # the first steps after a start are slower
        flops = arithmetic(size.sequences, config.dtype)
        none = Comparison(
            f"nucleus: {what}", "ours", "no top-p", "tok/s", "at least", 0.9,
        )  # fmt: skip
        if flops:
            none.limit = flops / (2 * describe(model).parameters)
            none.limit_is = f"the products of the generated tokens alone, at {flops / 1e9:.0f} GFLOP/s"
        theirs = Comparison(f"nucleus: {what}", "ours", "vLLM's own top-p", "tok/s", "at least", 1.0)
        return [
            in_turn(none, lambda r: rate("ours", r), lambda r: rate("none", r), rounds),
            in_turn(theirs, lambda r: rate("ours", r), lambda r: rate("vllm", r), rounds),
        ]
