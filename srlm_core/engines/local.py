"""An engine of our own: one child process, or several replicas, and many callers over their batches."""

import itertools
import logging
import math
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from srlm_core.config import EngineConfig
from srlm_core.engines.child import Child
from srlm_core.engines.hardware import Placement
from srlm_core.engines.messages import Appraise, Choose, Draw, Question, Refused, Start, Weigh
from srlm_core.engines.protocol import Completion, LogProb, Request, Reward, ScoredText, TokenScores
from srlm_core.engines.replica import RESTARTS, Host, Lost, Mailbox, Replica, placements
from srlm_core.errors import EngineDied, ModelError

log = logging.getLogger("srlm")
AHEAD, AHEAD_OF_OTHERS = 1.0, 0.25
"""Share of a full batch that a replica is asked for in advance: alone, and where another could take it over."""
ASKED_AT_MOST = 3
"""How often something is asked for whose replica died: it may be what they die of."""


class Site(Protocol):
    """Where replicas run. A context manager: leaving it gives everything back."""

    @property
    def places(self) -> Sequence[Placement]:
        """Where each replica runs."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def host(self, number: int, module: str, *, log: Path, env: Mapping[str, str]) -> Host:
        """Start what a replica runs, once more where it ran before."""
        ...


class ThisMachine:
    """Runs replicas as child processes."""

    def __init__(self, config: EngineConfig) -> None:
        self.places = placements(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def host(self, number: int, module: str, *, log: Path, env: Mapping[str, str]) -> Host:
        return Child(module, log=log, env=env, channel=True)


@dataclass
class _Asked:
    """Something that is asked for."""

    item: Any
    left: int = 0
    """Answers to come."""
    times: int = 0
    answered: set[int] = field(default_factory=set)
    """The indexes of what came: of a request that is asked again, only the rest is new."""

    def is_new(self, result: Any) -> bool:
        """Whether this was not answered before; notes that it is now."""
        index = result.index if isinstance(result, Completion) else 0
        new = index not in self.answered
        self.answered.add(index)
        return new


class _Call:
    """One caller's list: what comes, what is under way, and who owes how many answers."""

    def __init__(self, replicas: Sequence[Replica], items: Iterable[Any]) -> None:
        self.feed, self.coming = map(_Asked, items), deque[_Asked]()
        self._replicas = replicas
        self._mailbox: Mailbox = queue.SimpleQueue()
        self._under_way: dict[tuple[Replica, int], _Asked] = {}
        self._owed = dict.fromkeys(replicas, 0)

    def owed(self) -> dict[Replica, int]:
        """Say what each replica owes; those that are dead are left out."""
        return {replica: owed for replica, owed in self._owed.items() if replica.alive}

    def ask(self, replica: Replica, question: Callable[[int, Any], Question], size: Callable[[Any], int]) -> None:
        """Ask for what comes next."""
        one = self.coming.popleft()
        try:
            key = replica.send(lambda key: question(key, one.item), size(one.item), self._mailbox)
        except EngineDied:
            self.coming.appendleft(one)
            return
        one.left, one.times = size(one.item), one.times + 1
        self._under_way[replica, key] = one
        self._owed[replica] += one.left

    def is_over(self) -> bool:
        """Whether everything is answered. Raises EngineDied where nobody is left to answer the rest."""
        if self._under_way:
            return False
        self.coming.extend(itertools.islice(self.feed, not self.coming))
        if self.coming and not self.owed():
            raise self._replicas[-1].death()
        return not self.coming

    def answers(self) -> Iterator[Any]:
        """Wait for an answer where one is under way, and yield what it says, if that is new."""
        if not self._under_way:
            return
        replica, answer = self._mailbox.get()
        one = self._under_way.get((replica, answer.key or 0))
        if one is None:
            return  # it comes after it was given up: it is asked again
        gone = isinstance(answer, Lost)
        answered = one.left if gone else 1
        self._owed[replica] -= answered
        one.left -= answered
        if not one.left:
            del self._under_way[replica, answer.key or 0]
        if isinstance(answer, Refused):
            raise ModelError(answer.message)
        if not isinstance(answer, Lost):
            yield from [answer.result] if one.is_new(answer.result) else []
        elif one.times >= ASKED_AT_MOST:
            raise replica.death()
        else:
            self.coming.appendleft(one)

    def end(self) -> None:
        """Forget what is still under way."""
        for replica in self._replicas:
            replica.forget(self._mailbox)


class LocalEngine:
    """Speaks the engine protocol for the child processes that run the model.

    Each call keeps `max_sequences` sequences of each replica asked for, and some ahead, and pulls its requests as
    others finish: the batches are full while one caller alone is asking, and a long list never lies in memory twice.
    A request goes to the replica that owes least. What is left at the end of a list is not asked for ahead: whichever
    replica has room first gets it. Where one of several dies, what it owed is asked of the others, and it is started
    again; where nobody is left, the call ends with EngineDied.
    """

    kind: str
    module: str
    """What a child runs."""
    capabilities = frozenset({"generate", "logprobs", "token_scores"})

    def __init__(
        self,
        config: EngineConfig,
        model: Path,
        *,
        log: Path,
        trust_remote_code: bool = False,
        site: Site | None = None,
    ) -> None:
        self.config, self.model, self.log, self.trust_remote_code = config, model, log, trust_remote_code
        self.site = site or ThisMachine(config)
        self.context = config.context
        self.replicas: list[Replica] = []
        self._open = ExitStack()

    def environment(self, place: Placement) -> Mapping[str, str]:
        """Return what a child's environment has on top of ours."""
        return {}

    def start(self, place: Placement) -> Start:
        """Return a child's first word."""
        config = self.config.model_dump_json()
        return Start(config, str(self.model), self.trust_remote_code, place.threads, place.on_gpu)

    def __enter__(self) -> Self:
        """Start all replicas at once, and wait until they can be asked; if one cannot start, none stays.

        Raises ModelError or EngineDied.
        """
        with ExitStack() as opened, ThreadPoolExecutor(len(self.site.places)) as pool:
            opened.enter_context(self.site)
            starts = [pool.submit(self._replica, *numbered) for numbered in enumerate(self.site.places)]
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
        several = len(self.site.places) > 1
        path = self.log.with_stem(f"{self.log.stem}_{number}") if several else self.log
        host = partial(self.site.host, number, self.module, log=path, env=self.environment(place))
        name = f"{self.kind} engine of {self.model}" + (f" (replica {number})" if several else "")
        return Replica(name, host, self.start(place), RESTARTS if several else 0)

    def _ask(
        self,
        items: Iterable[Any],
        question: Callable[[int, Any], Question],
        size: Callable[[Any], int] = lambda item: 1,
    ) -> Iterator[Any]:
        """Yield the answers to all items, asking for more as they come; `size` is how many an item has."""
        if not self.replicas:
            raise EngineDied(f"{self.kind} engine of {self.model} was not started: enter it first.")
        call = _Call(self.replicas, items)
        try:
            while not call.is_over():
                while (replica := self._with_room(call.owed(), call.coming, call.feed)) is not None:
                    call.ask(replica, question, size)
                yield from call.answers()
        finally:
            call.end()

    def _with_room(self, asked: Mapping[Replica, int], coming: deque[Any], feed: Iterator[Any]) -> Replica | None:
        """Say who is to be asked for what comes next; None where nothing comes, or nobody has room in this call."""
        assert self.config.max_sequences, "open_engine fills it in"
        batch, several = self.config.max_sequences, len(asked) > 1
        ahead = AHEAD_OF_OTHERS if several else AHEAD
        with_room = [replica for replica, n in asked.items() if n < math.ceil((1 + ahead) * batch)]
        if not with_room:
            return None
        seen = len(asked) * batch if several else 1
        coming.extend(itertools.islice(feed, max(0, seen - len(coming))))
        if len(coming) < seen:
            with_room = [replica for replica in with_room if asked[replica] < batch]
        return min(with_room, key=lambda replica: replica.owed, default=None) if coming else None
