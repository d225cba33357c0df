"""Several engines of one model side by side on one machine: the next request goes to one that has the least to do."""

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.hardware import Placement
from srlm_core.engines.local import LocalEngine
from srlm_core.engines.protocol import Completion, Engine, LogProb, Request, ScoredText, TokenScores
from srlm_core.errors import ConfigError

_DONE = object()


AHEAD = 0.25
"""Share of a full batch that an engine is asked for in advance: what it has, a faster one cannot take over."""


class Replicas:
    """Speaks the engine protocol for several engines; their answers come merged."""

    def __init__(self, config: EngineConfig, model: Path, *, log: Path, trust_remote_code: bool = False) -> None:
        one = config.model_copy(update={"replicas": 1})
        make = _engine_of(config)
        assert config.max_sequences, "open_engine fills it in"
        self._room = 2 * config.max_sequences
        self._engines = [
            make(
                one,
                model,
                log=log.with_stem(f"{log.stem}_{i}"),
                trust_remote_code=trust_remote_code,
                placement=place,
                ahead=AHEAD,
            )
            for i, place in enumerate(placements(config))
        ]
        self._open = ExitStack()

    @property
    def kind(self) -> str:
        return self._engines[0].kind

    @property
    def context(self) -> int:
        return min(engine.context for engine in self._engines)

    @property
    def capabilities(self) -> frozenset[str]:
        return frozenset.intersection(*(engine.capabilities for engine in self._engines))

    def __enter__(self) -> Self:
        """Start all of them at once; if one cannot start, none stays."""
        with ExitStack() as opened, ThreadPoolExecutor(len(self._engines)) as pool:
            starts = [pool.submit(engine.__enter__) for engine in self._engines]
            failures = [error for start in starts if (error := start.exception()) is not None]
            for start, engine in zip(starts, self._engines, strict=True):
                if start.exception() is None:
                    opened.push(engine.__exit__)
            if failures:
                raise failures[0]
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return self._spread(requests, lambda engine, share: engine.generate(share), lambda request: request.n)

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        return self._spread(rows, lambda engine, share: engine.logprobs(share))

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        return self._spread(requests, lambda engine, share: engine.token_scores(share, choices))

    def _spread(
        self,
        items: Iterable[Any],
        call: Callable[[Engine, Iterator[Any]], Iterator[Any]],
        size: Callable[[Any], int] = lambda item: 1,
    ) -> Iterator[Any]:
        """Let every engine pull from one list, and yield what any of them answers. The first error ends all.

        `size` is the number of answers that an item gets.
        """
        answers: queue.Queue[Any] = queue.Queue(self._room)
        over = threading.Event()
        shared = _Shared(items, size, len(self._engines), over)

        def put(word: Any) -> None:
            while not over.is_set():
                try:
                    answers.put(word, timeout=0.5)
                    return
                except queue.Full:
                    continue

        def work(number: int, engine: Engine) -> None:
            try:
                for answer in call(engine, shared.of(number)):
                    shared.answered(number)
                    put(answer)
                    if over.is_set():
                        return
                put(_DONE)
            except Exception as error:  # handed to the caller's thread, which raises it
                put(error)

        threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(self._engines)]
        try:
            for thread in threads:
                thread.start()
            left = len(threads)
            while left:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                if answer is _DONE:
                    left -= 1
                else:
                    yield answer
        finally:
            over.set()


class _Shared:
    """One list for several engines, which look ahead: the first to come must not take what the others could begin."""

    def __init__(self, items: Iterable[Any], size: Callable[[Any], int], engines: int, over: threading.Event) -> None:
        self._items, self._size, self._over = iter(items), size, over
        self._busy = [0.0] * engines
        """Answers that each engine still owes."""
        self._turn = threading.Condition()

    def of(self, number: int) -> Iterator[Any]:
        """Yield items for one engine, each when no other has less to do; ends for all when `over` is set."""
        while (item := self._next(number)) is not _DONE:
            yield item

    def answered(self, number: int) -> None:
        """Count an answer of one engine."""
        with self._turn:
            self._busy[number] -= 1
            self._turn.notify_all()

    def _next(self, number: int) -> Any:
        with self._turn:
            while not self._over.is_set() and self._busy[number] > min(self._busy):
                self._turn.wait(0.5)
            item = _DONE if self._over.is_set() else next(self._items, _DONE)
            if item is _DONE:
                self._busy[number] = math.inf  # it asks no more: the others need not wait for it
            else:
                self._busy[number] += self._size(item)
            self._turn.notify_all()
            return item


def placements(config: EngineConfig) -> list[Placement]:
    """Divide this machine among the replicas. Raises ConfigError where it is too small for them."""
    gpus, cores, n = hardware.gpus(), hardware.cores(), config.replicas
    if gpus and n * config.tensor_parallel > len(gpus):
        raise ConfigError(
            f"engine.replicas: expected at most {len(gpus) // config.tensor_parallel} on {len(gpus)} GPU(s) with "
            f"engine.tensor_parallel={config.tensor_parallel}, got {n}. Lower one of them."
        )
    each = len(cores) // n
    if not gpus and (each < 1 or (config.threads or 1) > each):
        raise ConfigError(
            f"engine.replicas: expected {n} × engine.threads={config.threads or 1} to fit {len(cores)} core(s). "
            "Lower one of them."
        )
    per = config.tensor_parallel
    return [
        Placement(cores[i * each : (i + 1) * each], gpus[i * per : (i + 1) * per] if gpus else ())
        for i in range(n)
    ]  # fmt: skip


def _engine_of(config: EngineConfig) -> type[LocalEngine]:
    if config.kind == "vllm":
        from srlm_core.engines.vllm import VllmEngine

        return VllmEngine
    from srlm_core.engines.transformers import TransformersEngine

    return TransformersEngine
