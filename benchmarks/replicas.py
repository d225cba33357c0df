"""Two engines of one core each against one engine of one core."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.sides import Comparison, in_turn, stopwatch
from benchmarks.workload import requests, small_model
from srlm_core.config import EngineConfig
from srlm_core.engines import hardware, open_engine
from srlm_core.engines.protocol import Engine


class Size(NamedTuple):
    requests: int
    tokens: int


SIZES = {"cpu": Size(160, 48), "gpu": Size(4096, 256)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Answer the same requests with both, each side's engines idle while the other works."""
    with tempfile.TemporaryDirectory() as logs, _open(1, Path(logs)) as one, _open(2, Path(logs)) as two:

        def rate(engine: Engine, r: int, n: int = size.requests) -> float:
            with stopwatch() as seconds:
                tokens = sum(done.n_tokens for done in engine.generate(requests(n, size.tokens, r)))
                return tokens / seconds()

        each = "GPU" if hardware.gpus() else "core"
        made = Comparison("replicas", f"two, one {each} each", f"one {each}", "tok/s", "at least", 1.8)
        for engine in (one, two):
            rate(engine, rounds, 8)  # the first steps after a start are slower
        return [in_turn(made, lambda r: rate(two, r), lambda r: rate(one, r), rounds)]


@contextmanager
def _open(replicas: int, logs: Path) -> Iterator[Engine]:
    threads = None if hardware.gpus() else 1
    config = EngineConfig(context=1024, max_sequences=64, kv_cache_gib=2.0, replicas=replicas, threads=threads)
    with open_engine(config, small_model(), log=logs / f"{replicas}.log") as engine:
        yield engine
