"""Several engines of one model side by side on one machine: each takes the next request when it has room."""

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


class Replicas:
    """Speaks the engine protocol for several engines; their answers come merged."""

    def __init__(self, config: EngineConfig, model: Path, *, log: Path, trust_remote_code: bool = False) -> None:
        one = config.model_copy(update={"replicas": 1})
        make = _engine_of(config)
        assert config.max_sequences, "open_engine fills it in"
        self._room = 2 * config.max_sequences
        self._engines = [
            make(one, model, log=log.with_stem(f"{log.stem}_{i}"), trust_remote_code=trust_remote_code, placement=place)
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
        return self._spread(requests, lambda engine, share: engine.generate(share))

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        return self._spread(rows, lambda engine, share: engine.logprobs(share))

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        return self._spread(requests, lambda engine, share: engine.token_scores(share, choices))

    def _spread(self, items: Iterable[Any], call: Callable[[Engine, Iterator[Any]], Iterator[Any]]) -> Iterator[Any]:
        """Let every engine pull from one list, and yield what any of them answers. The first error ends all."""
        answers: queue.Queue[Any] = queue.Queue(self._room)
        over = threading.Event()
        share = _Shared(items, over)

        def put(word: Any) -> None:
            while not over.is_set():
                try:
                    answers.put(word, timeout=0.5)
                    return
                except queue.Full:
                    continue

        def work(engine: Engine) -> None:
            try:
                for answer in call(engine, iter(share)):
                    put(answer)
                    if over.is_set():
                        return
                put(_DONE)
            except Exception as error:  # handed to the caller's thread, which raises it
                put(error)

        threads = [threading.Thread(target=work, args=(engine,), daemon=True) for engine in self._engines]
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
    """One iterator for several threads; ends for all when `over` is set."""

    def __init__(self, items: Iterable[Any], over: threading.Event) -> None:
        self._items, self._over, self._lock = iter(items), over, threading.Lock()

    def __iter__(self) -> Iterator[Any]:
        while not self._over.is_set():
            with self._lock:
                item = next(self._items, _DONE)
            if item is _DONE:
                return
            yield item


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
