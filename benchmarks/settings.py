"""The engine's settings, each against another value: what engines/tuning.py chooses by."""

from contextlib import ExitStack
from typing import NamedTuple

from benchmarks.bare import Asked, Bare
from benchmarks.sides import Comparison, Side, in_turn, stopwatch
from benchmarks.workload import engine, requests, small_model
from srlm_core.config import EngineConfig
from srlm_core.engines import hardware


class Size(NamedTuple):
    requests: int
    tokens: int
    batches: tuple[int, ...]
    """Other numbers of sequences at once than the chosen one."""


SIZES = {"cpu": Size(256, 16, (16, 256)), "gpu": Size(4096, 128, (64, 1024))}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Hold what was chosen against other values one by one, everything else being equal; all engines are open."""
    chosen, model = engine(kv_cache_gib=1.5, gpu_memory=0.15), small_model()
    others = [(f"{n} sequences", {"max_sequences": n}, 1.0) for n in size.batches]
    if not hardware.gpus() and len(hardware.cores()) > 1:
        others.append(("1 thread", {"threads": 1}, 1.5))
    others.append(("compiled", {"compiled": True}, 0.9))
    ours_is = f"{chosen.max_sequences} sequences, {len(hardware.cores())} core(s), eager"

    with ExitStack() as stack:

        def started(config: EngineConfig) -> tuple[Side, float]:
            with stopwatch() as seconds:
                bare = stack.enter_context(Bare(config, model))
                return (lambda r: _rate(bare, size, r)), round(seconds(), 1)

        ours, our_start = started(chosen)
        made = []
        for theirs_is, changed, aim in others:
            theirs, start = started(chosen.model_copy(update=changed))
            comparison = Comparison(f"settings: {theirs_is}", ours_is, theirs_is, "tok/s", "at least", aim)
            comparison.also = {"seconds to start": {"ours": our_start, "theirs": start}}
            made.append((comparison, theirs))
        in_turn(ours, made, rounds)
        return [comparison for comparison, _ in made]


def _rate(bare: Bare, size: Size, r: int) -> float:
    done = bare.ask(Asked(requests(size.requests, size.tokens, r), ends=False, fresh=True))
    return done.tokens / done.seconds
