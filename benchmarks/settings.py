"""The engine's settings, each against another value: what engines/tuning.py chooses by."""

from typing import NamedTuple

from benchmarks.bare import Asked, Bare
from benchmarks.sides import Comparison, in_turn, stopwatch
from benchmarks.workload import engine, requests, small_model
from srlm_core.config import EngineConfig
from srlm_core.engines import hardware


class Size(NamedTuple):
    requests: int
    tokens: int
    batches: tuple[int, ...]
    """Other numbers of sequences at once than the chosen one."""


SIZES = {"cpu": Size(256, 32, (16, 256)), "gpu": Size(4096, 128, (64, 1024))}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Hold each choice against another, everything else being equal."""
    chosen = engine()
    others = [(f"{n} sequences", {"max_sequences": n}, 1.0) for n in size.batches]
    if not hardware.gpus() and len(hardware.cores()) > 1:
        others.append(("1 thread", {"threads": 1}, 1.5))
    others.append(("compiled", {"compiled": True}, 0.9))
    ours_is = f"{chosen.max_sequences} sequences, {len(hardware.cores())} core(s), eager"
    return [
        _compare(chosen, chosen.model_copy(update=changed), ours_is, theirs_is, aim, size, rounds)
        for theirs_is, changed, aim in others
    ]


def _compare(
    chosen: EngineConfig, other: EngineConfig, ours_is: str, theirs_is: str, aim: float, size: Size, rounds: int
) -> Comparison:
    def rate(bare: Bare, r: int) -> float:
        done = bare.ask(Asked(requests(size.requests, size.tokens, r), ends=False, fresh=True))
        return done.tokens / done.seconds

    model = small_model()
    with stopwatch() as seconds, Bare(chosen, model) as ours:
        start = seconds()
        with Bare(other, model) as theirs:
            starts = {"ours": round(start, 1), theirs_is: round(seconds() - start, 1)}
            made = Comparison(f"settings: {theirs_is}", ours_is, theirs_is, "tok/s", "at least", aim)
            made.also = {"seconds to start": starts}
            return in_turn(made, lambda r: rate(ours, r), lambda r: rate(theirs, r), rounds)
