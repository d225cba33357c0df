"""Two replicas as Ray actors against two as child processes, on the same cores: what Ray costs."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.sides import Comparison, allowed, in_turn, stopwatch
from benchmarks.workload import engine, requests, small_model
from srlm_core.config import EngineConfig
from srlm_core.engines import hardware, open_engine, site_of
from srlm_core.engines.protocol import Completion, Engine, Request
from srlm_core.engines.scripted import base_model
from srlm_core.engines.scripted_replicas import ScriptedReplicas


class Size(NamedTuple):
    requests: int
    tokens: int
    at_once: int
    """Sequences in an engine's batch."""
    scripted: int
    """Requests to the scripted engine, which answers in no time: all there is to see is the way."""


SIZES = {"cpu": Size(192, 24, 32, 8_000), "gpu": Size(8192, 256, 256, 8_000)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Ask both for the same, one side's engines idle while the other works; starts are left out."""
    if len(hardware.gpus() or hardware.cores()) < 2:
        raise SystemExit("placement: expected two GPUs, or two cores where there is no GPU; this machine has one.")
    with tempfile.TemporaryDirectory() as folder:
        return [_scripted(Path(folder), size, rounds), _real(Path(folder), size, rounds)]


def _scripted(folder: Path, size: Size, rounds: int) -> Comparison:
    """See that both answer the same, and what the way over Ray adds to a request."""
    model, added = base_model(folder / "M0"), []
    with ExitStack() as stack:
        there, here = (stack.enter_context(_replicas(model, where, folder)) for where in ("ray", "local"))
        for r in range(rounds + 1):
            asked = requests(size.scripted, 1024, r)
            (seconds, done), (plain, same) = _seconds(there, asked), _seconds(here, asked)
            if sorted(done) != sorted(same):
                raise SystemExit("placement: expected the same answers of both, got others.")
            added.append(round((seconds - plain) / size.scripted * 1000, 5))
    return allowed("placement: what Ray adds to a request of the scripted engine", added[1:], 1.0, "ms")


def _real(folder: Path, size: Size, rounds: int) -> Comparison:
    name = f"placement: the small model, {size.requests} requests of {size.tokens} tokens at most"
    made = Comparison(name, "two Ray actors", "two child processes", "s", "at most", 1.15)
    with ExitStack() as stack:
        there, here = (stack.enter_context(_open(where, size, folder)) for where in ("ray", "local"))

        def side(engine: Engine, r: int) -> float:
            asked = requests(size.requests, size.tokens, r)
            seconds, done = _seconds(engine, asked)
            if Counter(one.request_id for one in done) != {request.id: request.n for request in asked}:
                raise SystemExit("placement: expected every request answered once.")
            return seconds

        for engine in (there, here):
            _seconds(engine, requests(8, size.tokens, rounds))  # the first steps after a start are slower
        in_turn(lambda r: side(there, r), [(made, lambda r: side(here, r))], rounds)
    return made


def _seconds(engine: Engine, asked: list[Request]) -> tuple[float, list[Completion]]:
    with stopwatch() as seconds:
        done = list(engine.generate(asked))
        return seconds(), done


def _replicas(model: Path, where: str, folder: Path) -> ScriptedReplicas:
    config = EngineConfig.model_validate(
        {"kind": "scripted", "placement": where, "replicas": 2, "threads": 1, "max_sequences": 64}
    )
    return ScriptedReplicas(config, model, log=folder / f"{where}.log", site=site_of(config))


@contextmanager
def _open(where: str, size: Size, folder: Path) -> Iterator[Engine]:
    threads = None if hardware.gpus() else 1
    config = engine(max_sequences=size.at_once, kv_cache_gib=0.5, replicas=2, threads=threads, placement=where)
    with open_engine(config, small_model(), log=folder / f"{where}.log") as opened:
        yield opened
