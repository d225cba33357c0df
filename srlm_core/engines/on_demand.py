"""An engine that starts when it is first asked, is started once more if it dies, and counts what it does."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from srlm_core.engines.protocol import Completion, Engine, LogProb, Request, Reward, ScoredText, TokenScores
from srlm_core.errors import EngineClosed, EngineDied

log = logging.getLogger("srlm")


@dataclass
class Usage:
    """What one stage asked of an engine."""

    requests: int = 0
    tokens: int = 0
    """Tokens generated."""
    seconds: float = 0.0
    """Wall time of its calls, summed; calls overlap, so stages sum to more than the clock."""


@dataclass
class OnDemand:
    """Holds one model's engine for as long as the loop needs it; a campaign that has nothing to ask starts none."""

    model: str
    start: Callable[[], Engine]
    on_start: Callable[[str, float], None]
    """Told the model's name and the seconds that the start took."""
    usage: dict[str, Usage] = field(default_factory=lambda: defaultdict(Usage))
    _engine: Engine | None = None
    _deaths: int = 0
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._closed = True  # threads that are still waiting must not start it again
            if self._engine is not None:
                self._engine.__exit__(*exc)
                self._engine = None

    def live(self) -> Engine:
        """Return the running engine, starting it if needed."""
        with self._lock:
            if self._closed:
                raise EngineClosed(f"the engine of {self.model} was closed: the campaign is stopping.")
            if self._engine is None:
                started = time.monotonic()
                self._engine = self.start().__enter__()
                self.on_start(self.model, time.monotonic() - started)
            return self._engine

    def bury(self, dead: Engine, error: EngineDied) -> None:
        """Note a death. The first one leaves room for one restart, the second is raised for good."""
        with self._lock:
            if self._closed:
                raise EngineClosed(f"the engine of {self.model} was closed: the campaign is stopping.") from error
            if self._engine is not dead:
                return  # another thread saw it first
            self._engine = None
            self._deaths += 1
            dead.__exit__(type(error), error, None)
        if self._deaths > 1:
            raise EngineDied(f"the engine of {self.model} died again after one restart. {error}") from error

    def count(self, stage: str, requests: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        """Add to what a stage asked: its shards do so from several threads."""
        with self._counting:
            used = self.usage[stage]
            used.requests += requests
            used.tokens += tokens
            used.seconds += seconds

    def stage(self, name: str) -> "StageView":
        """Return this engine as one stage sees it, so that what the stage asks is counted under its name."""
        return StageView(self, name)


class StageView:
    """The engine protocol over an OnDemand, counted under one stage."""

    def __init__(self, engine: OnDemand, name: str) -> None:
        self._on_demand, self._name = engine, name
        self.tokens = 0
        """Tokens generated through this view."""

    @property
    def kind(self) -> str:
        return self._on_demand.live().kind

    @property
    def context(self) -> int:
        return self._on_demand.live().context

    @property
    def capabilities(self) -> frozenset[str]:
        return self._on_demand.live().capabilities

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for done in self._counted(lambda engine, asked: engine.generate(asked), requests):
            self._on_demand.count(self._name, tokens=done.n_tokens)
            self.tokens += done.n_tokens
            yield done

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        return self._counted(lambda engine, asked: engine.logprobs(asked), rows)

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        return self._counted(lambda engine, asked: engine.token_scores(asked, choices), requests)

    def rewards(self, rows: Iterable[ScoredText]) -> Iterator[Reward]:
        return self._counted(lambda engine, asked: engine.rewards(asked), rows)

    def _counted(self, call: Callable[[Engine, Iterable], Iterator], asked: Iterable) -> Iterator:
        asked = list(asked)
        if not asked:
            return
        engine, started = self._on_demand.live(), time.monotonic()
        try:
            yield from call(engine, asked)
        except EngineDied as error:
            self._on_demand.bury(engine, error)
            raise
        self._on_demand.count(self._name, requests=len(asked), seconds=time.monotonic() - started)
