"""An engine on this machine: one child process, or several replicas, and many callers over their batches."""

import itertools
import logging
import math
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.child import Child
from srlm_core.engines.hardware import Placement
from srlm_core.engines.messages import Appraise, Choose, Draw, Question, Refused, Start, Weigh
from srlm_core.engines.protocol import Completion, LogProb, Request, Reward, ScoredText, TokenScores
from srlm_core.engines.replica import Mailbox, Replica, placements
from srlm_core.errors import EngineDied, ModelError

log = logging.getLogger("srlm")
AHEAD, AHEAD_OF_OTHERS = 1.0, 0.25
"""Share of a full batch that a replica is asked for in advance: alone, and where another could take it over."""


class LocalEngine:
    """Speaks the engine protocol for the child processes that run the model.

    Each call keeps `max_sequences` sequences of each replica asked for, and some ahead, and pulls its requests as
    others finish: the batches are full while one caller alone is asking, and a long list never lies in memory twice.
    A request goes to the replica that owes least. What is left at the end of a list is not asked for ahead: whichever
    replica has room first gets it.
    """

    kind: str
    module: str
    """What a child runs."""
    capabilities = frozenset({"generate", "logprobs", "token_scores"})

    def __init__(self, config: EngineConfig, model: Path, *, log: Path, trust_remote_code: bool = False) -> None:
        self.config, self.model, self.log, self.trust_remote_code = config, model, log, trust_remote_code
        self.places = placements(config)
        """Where each replica runs."""
        self.context = config.context
        self.replicas: list[Replica] = []
        self._open = ExitStack()

    def environment(self, place: Placement) -> Mapping[str, str]:
        """Return what a child's environment has on top of ours."""
        return {}

    def start(self, place: Placement) -> Start:
        """Return a child's first word."""
        on_gpu = bool(hardware.gpus())
        return Start(self.config.model_dump_json(), str(self.model), self.trust_remote_code, len(place.cores), on_gpu)

    def __enter__(self) -> Self:
        """Start all replicas at once, and wait until they can be asked; if one cannot start, none stays.

        Raises ModelError or EngineDied.
        """
        with ExitStack() as opened, ThreadPoolExecutor(len(self.places)) as pool:
            starts = [pool.submit(self._replica, *numbered) for numbered in enumerate(self.places)]
            failures = [error for start in starts if (error := start.exception()) is not None]
            self.replicas = [start.result() for start in starts if start.exception() is None]
            for replica in self.replicas:
                opened.callback(replica.close)
            if failures:
                raise failures[0]
            self._open = opened.pop_all()
        self.context = min(replica.context for replica in self.replicas)
        if self.context < self.config.context:
            told = "engine.context is %d, but %s ends at %d: that holds"
            log.warning(told, self.config.context, self.model, self.context)
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        self._require("generate")
        return self._ask(requests, lambda key, request: Draw(key, request), lambda request: request.n)

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        self._require("logprobs")
        return self._ask(rows, lambda key, row: Weigh(key, row))

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        self._require("token_scores")
        wanted = tuple(choices)
        return self._ask(requests, lambda key, request: Choose(key, request, wanted))

    def rewards(self, rows: Iterable[ScoredText]) -> Iterator[Reward]:
        self._require("rewards")
        return self._ask(rows, lambda key, row: Appraise(key, row))

    def _require(self, asked: str) -> None:
        if asked not in self.capabilities:
            needed, able = "reward" if asked == "rewards" else "language", ", ".join(sorted(self.capabilities))
            raise ModelError(
                f"{self.model}: expected a model that can be asked for {asked}, got one for {able}. "
                f"Name a {needed} model."
            )

    def _replica(self, number: int, place: Placement) -> Replica:
        several = len(self.places) > 1
        path = self.log.with_stem(f"{self.log.stem}_{number}") if several else self.log
        child = Child(self.module, log=path, env=self.environment(place), channel=True)
        try:
            return Replica(f"{self.kind} engine of {self.model}", child, self.start(place))
        except BaseException:
            child.close()
            raise

    def _ask(
        self,
        items: Iterable[Any],
        question: Callable[[int, Any], Question],
        size: Callable[[Any], int] = lambda item: 1,
    ) -> Iterator[Any]:
        """Yield the answers to all items, asking for more as they come; `size` is how many an item has."""
        mailbox: Mailbox = queue.SimpleQueue()
        asked = dict.fromkeys(self.replicas, 0)
        if not asked:
            raise EngineDied(f"{self.kind} engine of {self.model} was not started: enter it first.")
        feed = iter(items)
        coming: deque[Any] = deque()
        try:
            while True:
                while (replica := self._with_room(asked, coming, feed)) is not None:
                    item = coming.popleft()
                    asked[replica] += size(item)
                    replica.send(lambda key, item=item: question(key, item), size(item), mailbox)
                if not any(asked.values()):
                    return
                replica, answer = mailbox.get()
                if answer is None:
                    raise replica.death()
                if isinstance(answer, Refused):
                    raise ModelError(answer.message)
                asked[replica] -= 1
                yield answer.result
        finally:
            for replica in asked:
                replica.forget(mailbox)

    def _with_room(self, asked: Mapping[Replica, int], coming: deque[Any], feed: Iterator[Any]) -> Replica | None:
        """Say who is to be asked for what comes next; None where nothing comes, or nobody has room in this call."""
        assert self.config.max_sequences, "open_engine fills it in"
        batch, several = self.config.max_sequences, len(asked) > 1
        ahead = AHEAD_OF_OTHERS if several else AHEAD
        with_room = [replica for replica, n in asked.items() if n < math.ceil((1 + ahead) * batch)]
        if not with_room:
            return None
        seen = len(asked) * batch if several else 1
        coming.extend(itertools.islice(feed, seen - len(coming)))
        if len(coming) < seen:
            with_room = [replica for replica in with_room if asked[replica] < batch]
        return min(with_room, key=lambda replica: replica.owed, default=None) if coming else None
