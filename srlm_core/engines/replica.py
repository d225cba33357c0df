"""One child process of an engine, seen from the parent: started, asked by many callers, heard until it is gone."""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.child import Child
from srlm_core.engines.hardware import Placement
from srlm_core.engines.messages import Answer, Forget, FromChild, Question, Refused, Start
from srlm_core.errors import ConfigError, EngineDied, ModelError

log = logging.getLogger("srlm")
_decode = msgspec.msgpack.Decoder(FromChild).decode
_encode = msgspec.msgpack.Encoder().encode

Mailbox = queue.SimpleQueue["tuple[Replica, Answer | Refused | None]"]
"""Where a call finds who answered what; None from one that is gone."""


@dataclass
class _Waiting:
    """A question under way."""

    mailbox: Mailbox
    answers: int
    """How many are still to come."""


class Replica:
    """Holds one child that is ready to be asked; `close` ends it."""

    def __init__(self, name: str, child: Child, start: Start) -> None:
        """Wait until the child can be asked. Raises ModelError where it refuses the model, EngineDied if it dies."""
        assert child.channel is not None
        self.name, self.child, self._channel = name, child, child.channel
        self.owed = 0
        """Answers to come, to all callers."""
        self._keys = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._over: str | None = None
        words = iter(self._channel)
        try:
            self._channel.send(_encode(start))
            first = _decode(next(words))
        except (OSError, StopIteration):
            raise EngineDied(f"{name}: expected it to start, but {child.obituary()}") from None
        if isinstance(first, Refused):
            raise ModelError(first.message)
        assert not isinstance(first, Answer)
        self.context = first.context
        threading.Thread(target=self._listen, args=(words,), daemon=True, name=f"answers of {name}").start()

    def close(self) -> None:
        """End the child, and tell who still waits."""
        self._end("it was closed while it was still asked")
        self.child.close()

    def send(self, question: Callable[[int], Question], answers: int, mailbox: Mailbox) -> None:
        """Ask something that has so many answers, which come to the mailbox. Raises EngineDied."""
        with self._lock:
            if self._over is not None:
                raise self.death()
            key = next(self._keys)
            self._waiting[key] = _Waiting(mailbox, answers)
            self.owed += answers
        try:
            self._channel.send(_encode(question(key)))
        except OSError:
            self._end(self.child.obituary())
            raise self.death() from None

    def forget(self, mailbox: Mailbox) -> None:
        """Drop what nobody will read: its caller stopped early, or failed."""
        with self._lock:
            keys = tuple(key for key, waiting in self._waiting.items() if waiting.mailbox is mailbox)
            for key in keys:
                self.owed -= self._waiting.pop(key).answers
            over = self._over
        if keys and over is None:
            try:
                self._channel.send(_encode(Forget(keys)))
            except OSError:
                self._end(self.child.obituary())

    def death(self) -> EngineDied:
        """Say how it ended."""
        return EngineDied(f"{self.name}: expected answers, but {self._over}")

    def _listen(self, words: Iterator[bytes]) -> None:
        """Hand each answer to the call that waits for it, until the child is gone."""
        for word in words:
            answer = _decode(word)
            assert isinstance(answer, Answer | Refused)
            mailbox = self._mailbox_for(answer)
            if mailbox is not None:
                mailbox.put((self, answer))
        if self._over is None:
            self._end(self.child.obituary())

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

    def _end(self, why: str) -> None:
        with self._lock:
            self._over = self._over or why
            for waiting in self._waiting.values():
                waiting.mailbox.put((self, None))


def placements(config: EngineConfig) -> list[Placement]:
    """Divide this machine among the replicas. Raises ConfigError where it is too small for them."""
    gpus, cores, n = hardware.gpus(), hardware.cores(), config.replicas
    if n == 1:
        return [Placement(cores[: config.threads])]
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
        Placement(cores[i * each :][: config.threads or each], gpus[i * per : (i + 1) * per] if gpus else ())
        for i in range(n)
    ]  # fmt: skip
