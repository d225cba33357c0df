"""One child process of an engine, seen from whoever asks: started, asked by many callers, started again if it dies."""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.hardware import Placement
from srlm_core.engines.messages import Answer, Forget, FromChild, Question, Refused, Start
from srlm_core.errors import ConfigError, EngineDied, ModelError

log = logging.getLogger("srlm")
_decode = msgspec.msgpack.Decoder(FromChild).decode
_encode = msgspec.msgpack.Encoder().encode

RESTARTS = 3
"""How often a replica that dies is started again, where others answer in the meantime."""


class Frames(Protocol):
    """Frames of bytes, both ways. Any thread may send; one thread receives."""

    def send(self, frame: bytes) -> None:
        """Send one frame; raises OSError when the other side is gone."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Yield frames until the other side is gone."""
        ...


class Host(Protocol):
    """What a replica runs in: a child process of ours (engines/child.py), or one on a cluster (engines/cluster.py)."""

    @property
    def channel(self) -> Frames | None: ...

    def close(self) -> None:
        """End it, and all that it started."""
        ...

    def obituary(self) -> str:
        """Say how it ended, where its log is, and its last words."""
        ...


class Lost(NamedTuple):
    """A question that nobody will answer any more: the replica died over it, or over another one."""

    key: int


Mailbox = queue.SimpleQueue["tuple[Replica, Answer | Refused | Lost]"]
"""Where a call finds who answered what."""


@dataclass
class _Waiting:
    """A question under way."""

    mailbox: Mailbox
    answers: int
    """How many are still to come."""


class Replica:
    """Holds one child that is ready to be asked; `close` ends it."""

    def __init__(self, name: str, host: Callable[[], Host], start: Start, restarts: int = 0) -> None:
        """Wait until the child can be asked. Raises ModelError where it refuses the model, EngineDied if it dies."""
        self.name, self._host, self._start, self._restarts = name, host, start, restarts
        self.owed = 0
        """Answers to come, to all callers."""
        self._keys = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._over: str | None = None
        self._closed = False
        words = self._begin()
        listening = {"args": (words,), "daemon": True, "name": f"answers of {name}"}
        self._listener = threading.Thread(target=self._listen, **listening)
        self._listener.start()

    @property
    def alive(self) -> bool:
        """Whether it can be asked now."""
        return self._over is None

    def close(self) -> None:
        """End the child, and tell who still waits."""
        with self._lock:
            self._closed = True
        self._end("it was closed while it was still asked")
        self.child.close()
        self._listener.join(10.0)

    def send(self, question: Callable[[int], Question], answers: int, mailbox: Mailbox) -> int:
        """Ask something that has so many answers, which come to the mailbox; returns its key. Raises EngineDied."""
        with self._lock:
            if self._over is not None:
                raise self.death()
            key = next(self._keys)
            self._waiting[key] = _Waiting(mailbox, answers)
            self.owed += answers
        self._tell(question(key))
        return key

    def forget(self, mailbox: Mailbox) -> None:
        """Drop what nobody will read: its caller stopped early, or failed."""
        with self._lock:
            keys = tuple(key for key, waiting in self._waiting.items() if waiting.mailbox is mailbox)
            for key in keys:
                self.owed -= self._waiting.pop(key).answers
        if keys and self.alive:
            self._tell(Forget(keys))

    def death(self) -> EngineDied:
        """Say how it ended."""
        return EngineDied(f"{self.name}: expected answers, but {self._over}")

    def _begin(self) -> Iterator[bytes]:
        """Start a child and wait for its first word; returns those that follow."""
        child = self._host()
        assert child.channel is not None
        with self._lock:
            self.child, self._channel = child, child.channel
            closed = self._closed
        try:
            if closed:
                raise EngineDied(f"{self.name}: expected it to start, but it was closed.")
            words = iter(self._channel)
            self._channel.send(_encode(self._start))
            first = _decode(next(words))
            if isinstance(first, Refused):
                raise ModelError(first.message)
        except (OSError, StopIteration):
            told = f"{self.name}: expected it to start, but {child.obituary()}"
            child.close()
            raise EngineDied(told) from None
        except BaseException:
            child.close()
            raise
        assert not isinstance(first, Answer)
        self.context = first.context
        return words

    def _listen(self, words: Iterator[bytes] | None) -> None:
        """Hand each answer to the call that waits for it, until the child is gone for good."""
        while words is not None:
            for word in words:
                answer = _decode(word)
                assert isinstance(answer, Answer | Refused)
                mailbox = self._mailbox_for(answer)
                if mailbox is not None:
                    mailbox.put((self, answer))
            if not self._closed:
                self._end(self.child.obituary())
                if self._restarts:
                    log.warning("%s is started again, and what it owed is asked again: %s", self.name, self._over)
            words = self._again()

    def _again(self) -> Iterator[bytes] | None:
        """Start a child in the place of the dead one; None where this was the end."""
        while self._restarts and not self._closed:
            self._restarts -= 1
            self.child.close()
            try:
                words = self._begin()
            except Exception as error:  # whatever keeps it from coming back: the others go on, and the log says why
                if not self._closed:
                    log.warning("%s could not be started again. %s", self.name, error)
                continue
            with self._lock:
                self._over = None if not self._closed else self._over
            log.warning("%s is there again", self.name)
            return words
        return None

    def _mailbox_for(self, answer: Answer | Refused) -> Mailbox | None:
        with self._lock:
            waiting = self._waiting.get(answer.key or 0)
            if waiting is None:
                return None
            answered = waiting.answers if isinstance(answer, Refused) else 1
            self.owed -= answered
            waiting.answers -= answered
            if not waiting.answers:
                del self._waiting[answer.key or 0]
            return waiting.mailbox

    def _tell(self, word: Question | Forget) -> None:
        try:
            self._channel.send(_encode(word))
        except OSError:
            self._end(self.child.obituary())

    def _end(self, why: str) -> None:
        """Note that it is gone, and give back what it was asked."""
        with self._lock:
            self._over = self._over or why
            lost, self._waiting, self.owed = self._waiting, {}, 0
        for key, waiting in lost.items():
            waiting.mailbox.put((self, Lost(key)))


def placements(config: EngineConfig) -> list[Placement]:
    """Divide this machine among the replicas. Raises ConfigError where it is too small for them."""
    gpus, cores, n = hardware.gpus(), hardware.cores(), config.replicas
    if n == 1:
        taken = cores[: config.threads]
        return [Placement(len(taken), taken, on_gpu=bool(gpus))]
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
    divided = [cores[i * each :][: config.threads or each] for i in range(n)]
    return [Placement(max(1, len(of)), of, gpus[i * per : (i + 1) * per], bool(gpus)) for i, of in enumerate(divided)]
