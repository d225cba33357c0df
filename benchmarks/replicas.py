"""Two engines of one core each against one engine of one core."""

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.products import products
from benchmarks.sides import Comparison, in_turn, stopwatch
from benchmarks.workload import engine, requests, small_model
from srlm_core.engines import hardware, open_engine
from srlm_core.engines.protocol import Engine


class Size(NamedTuple):
    requests: int
    tokens: int
    at_once: int
    """Sequences in an engine's batch. All requests end alike: with few batches the slower core's last one decides."""


SIZES = {"cpu": Size(256, 24, 32), "gpu": Size(8192, 256, 256)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Answer the same requests with both, each side's engines idle while the other works."""
    if len(hardware.gpus() or hardware.cores()) < 2:
        raise SystemExit("replicas: expected two GPUs, or two cores where there is no GPU; this machine has one.")
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one, two = (stack.enter_context(_open(replicas, size, logs)) for replicas in (1, 2))
        machine = None if hardware.gpus() else stack.enter_context(products())

        def rate(side: Engine, r: int, n: int = size.requests) -> float:
            with stopwatch() as seconds:
                tokens = sum(done.n_tokens for done in side.generate(requests(n, size.tokens, r)))
                return tokens / seconds()

        def ours(r: int) -> float:
            if machine:
                machine.measure()
            return rate(two, r)

        each = "GPU" if hardware.gpus() else "core"
        made = Comparison("replicas", f"two, one {each} each", f"one {each}", "tok/s", "at least", 1.8)
        for side in (one, two):
            rate(side, rounds, 8)  # the first steps after a start are slower
        in_turn(ours, [(made, lambda r: rate(one, r))], rounds)
        if machine:
            made.limit = statistics.median(machine.gains) * statistics.median(made.theirs)
            made.limit_is = "what both cores at once multiply more than one, by the same products in the same rounds"
            made.also = {"both cores' products over one's": machine.gains}
        return [made]


@contextmanager
def _open(replicas: int, size: Size, logs: Path) -> Iterator[Engine]:
    threads = None if hardware.gpus() else 1
    config = engine(max_sequences=size.at_once, kv_cache_gib=2.0, replicas=replicas, threads=threads)
    with open_engine(config, small_model(), log=logs / f"{replicas}.log") as opened:
        yield opened
