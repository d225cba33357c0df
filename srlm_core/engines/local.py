"""An engine in a child process, seen from the parent: the protocol as messages, many callers over one batch."""

import itertools
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.child import Child
from srlm_core.engines.hardware import Placement
from srlm_core.engines.protocol import Completion, LogProb, Request, ScoredText, TokenScores
from srlm_core.errors import EngineDied, ModelError

log = logging.getLogger("srlm")


class Start(msgspec.Struct, tag=True):
    """First word of the parent."""

    config: str
    """EngineConfig as JSON, its kind and dtype resolved."""
    model: str
    trust_remote_code: bool
    threads: int
    gpu: bool


class Draw(msgspec.Struct, tag=True):
    """Ask for a request's completions; answered by n Completed."""

    key: int
    request: Request


class Weigh(msgspec.Struct, tag=True):
    """Ask for a response's log-probability; answered by one Weighed."""

    key: int
    row: ScoredText


class Choose(msgspec.Struct, tag=True):
    """Ask for the probabilities of choices; answered by one Chosen."""

    key: int
    request: Request
    choices: tuple[str, ...]


class Forget(msgspec.Struct, tag=True):
    """Nobody waits for these any more."""

    keys: tuple[int, ...]


class Ready(msgspec.Struct, tag=True):
    """First word of the child: it can be asked."""

    context: int


class Completed(msgspec.Struct, tag=True):
    """Answer to Draw."""

    key: int
    result: Completion


class Weighed(msgspec.Struct, tag=True):
    """Answer to Weigh."""

    key: int
    result: LogProb


class Chosen(msgspec.Struct, tag=True):
    """Answer to Choose."""

    key: int
    result: TokenScores


class Refused(msgspec.Struct, tag=True):
    """A ModelError in the child: at the start (null key), or about one request."""

    key: int | None
    message: str


Question = Draw | Weigh | Choose
Answer = Completed | Weighed | Chosen
FromParent = Start | Draw | Weigh | Choose | Forget
FromChild = Ready | Completed | Weighed | Chosen | Refused
_decode = msgspec.msgpack.Decoder(FromChild).decode
_encode = msgspec.msgpack.Encoder().encode


class LocalEngine:
    """Speaks the engine protocol for a child process that runs the model.

    Each call keeps `max_sequences` sequences asked for, and a share `ahead` of that more, and pulls its requests as
    others finish: the child's batch is full while one caller alone is asking, and a long list never lies in memory
    twice.
    """

    kind: str
    module: str
    """What the child runs."""
    capabilities = frozenset({"generate", "logprobs", "token_scores"})

    def __init__(
        self,
        config: EngineConfig,
        model: Path,
        *,
        log: Path,
        trust_remote_code: bool = False,
        placement: Placement | None = None,
        ahead: float = 1.0,
    ) -> None:
        self.config, self.model, self.log, self.trust_remote_code = config, model, log, trust_remote_code
        self.placement = placement or Placement()
        self.context = config.context
        assert config.max_sequences, "open_engine fills it in"
        self._room = math.ceil((1 + ahead) * config.max_sequences)
        self._child: Child | None = None
        self._keys = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[FromChild | None]] = {}
        self._lock = threading.Lock()
        self._over: str | None = "it was not started: enter it first"

    def environment(self) -> Mapping[str, str]:
        """Return what the child's environment has on top of ours."""
        return {}

    @property
    def on_gpu(self) -> bool:
        """Whether the child has a CUDA device."""
        return bool(self.placement.gpus or hardware.gpus())

    @property
    def cores(self) -> tuple[int, ...]:
        """Processors of the child."""
        mine = self.placement.cores or hardware.cores()
        return mine[: self.config.threads or len(mine)]

    def __enter__(self) -> Self:
        """Start the child and wait until it can be asked. Raises ModelError or EngineDied."""
        self._child = Child(self.module, log=self.log, env=self.environment(), channel=True)
        try:
            self._begin(self._child)
        except BaseException:
            self._child.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end("it was closed while it was still asked")
        if self._child is not None:
            self._child.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return self._ask(requests, lambda key, request: Draw(key, request), lambda request: request.n)

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        return self._ask(rows, lambda key, row: Weigh(key, row), lambda row: 1)

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        wanted = tuple(choices)
        return self._ask(requests, lambda key, request: Choose(key, request, wanted), lambda request: 1)

    def _begin(self, child: Child) -> None:
        assert child.channel is not None
        start = Start(
            self.config.model_dump_json(), str(self.model), self.trust_remote_code, len(self.cores), self.on_gpu
        )
        words = iter(child.channel)
        try:
            child.channel.send(_encode(start))
            first = _decode(next(words))
        except (OSError, StopIteration):
            raise EngineDied(
                f"{self.kind} engine: expected it to start with {self.model}, but {child.obituary()}"
            ) from None
        if isinstance(first, Refused):
            raise ModelError(first.message)
        assert isinstance(first, Ready)
        if first.context < self.config.context:
            log.warning(
                "engine.context is %d, but %s ends at %d: that holds", self.config.context, self.model, first.context
            )
        self.context, self._over = first.context, None
        threading.Thread(target=self._listen, args=(child, words), daemon=True, name=f"{self.kind} replies").start()

    def _listen(self, child: Child, words: Iterator[bytes]) -> None:
        """Hand each reply to the call that waits for it, until the child is gone."""
        for word in words:
            reply = _decode(word)
            with self._lock:
                waiting = self._waiting.get(getattr(reply, "key", 0))
            if waiting is not None:
                waiting.put(reply)
        if self._over is None:
            self._end(child.obituary())

    def _end(self, why: str) -> None:
        with self._lock:
            self._over = self._over or why
            for waiting in self._waiting.values():
                waiting.put(None)

    def _ask(
        self, items: Iterable[Any], question: Callable[[int, Any], Question], size: Callable[[Any], int]
    ) -> Iterator[Any]:
        """Yield the answers to all items, asking for more as they come."""
        replies: queue.SimpleQueue[FromChild | None] = queue.SimpleQueue()
        left: dict[int, int] = {}
        feed, asked = iter(items), 0
        try:
            while True:
                while feed is not None and asked < self._room:
                    if (item := next(feed, None)) is None:
                        feed = None
                        break
                    asked += size(item)
                    left[self._send(question, item, replies)] = size(item)
                if not left:
                    return
                reply = replies.get()
                if reply is None:
                    raise self._death(len(left))
                if isinstance(reply, Refused):
                    raise ModelError(reply.message)
                assert isinstance(reply, Answer)
                asked -= 1
                left[reply.key] -= 1
                if not left[reply.key]:
                    del left[reply.key]
                    with self._lock:
                        del self._waiting[reply.key]
                yield reply.result
        finally:
            self._forget(tuple(left))

    def _send(
        self, question: Callable[[int, Any], Question], item: Any, replies: queue.SimpleQueue[FromChild | None]
    ) -> int:
        key = next(self._keys)
        with self._lock:
            if self._over is not None:
                raise self._death(0)
            self._waiting[key] = replies
        assert self._child is not None
        assert self._child.channel is not None
        try:
            self._child.channel.send(_encode(question(key, item)))
        except OSError:
            with self._lock:
                del self._waiting[key]
            self._end(self._child.obituary())
            raise self._death(0) from None
        return key

    def _forget(self, keys: tuple[int, ...]) -> None:
        """Drop what nobody will read: the caller stopped early, or failed."""
        if not keys:
            return
        with self._lock:
            for key in keys:
                self._waiting.pop(key, None)
            over = self._over
        if over is None and self._child is not None and self._child.channel is not None:
            try:
                self._child.channel.send(_encode(Forget(keys)))
            except OSError:
                self._end(self._child.obituary())

    def _death(self, n: int) -> EngineDied:
        asked = f"answers to {n} request(s)" if n else "it to be there"
        return EngineDied(f"{self.kind} engine of {self.model}: expected {asked}, but {self._over}")
