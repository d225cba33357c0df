"""Nucleus sampling without sorting the vocabulary, against no nucleus, and against the engine's own."""

from typing import NamedTuple

from benchmarks.bare import Asked, Bare
from benchmarks.sides import Comparison, arithmetic, in_turn
from benchmarks.workload import engine, requests, small_model
from srlm_core.engines.models import describe


class Size(NamedTuple):
    sequences: int
    tokens: int


SIZES = {"cpu": Size(128, 32), "gpu": Size(512, 256)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Draw the same number of tokens for the same requests, T = 0.7, with p = 0.9 and without."""
    config, model = engine(max_sequences=size.sequences), small_model()
    what = f"{size.sequences} sequences, T = 0.7, p = 0.9"
    with Bare(config, model) as bare:

        def rate(nucleus: str, r: int) -> float:
            done = bare.ask(Asked(requests(size.sequences, size.tokens, r), nucleus, ends=False, fresh=True))
            return done.tokens / done.seconds

        rate("ours", rounds)  # the first steps after a start are slower
        none = Comparison(f"nucleus: {what}", "ours", "no top-p", "tok/s", "at least", 0.9)
        theirs = Comparison(f"nucleus: {what}", "ours", "vLLM's own top-p", "tok/s", "at least", 1.0)
        if flops := arithmetic(size.sequences, config.dtype):
            none.limit = flops / (2 * describe(model).parameters)
            none.limit_is = f"the products of the generated tokens alone, at {flops / 1e9:.0f} GFLOP/s"
        in_turn(
            lambda r: rate("ours", r), [(none, lambda r: rate("none", r)), (theirs, lambda r: rate("vllm", r))], rounds
        )
        return [none, theirs]
