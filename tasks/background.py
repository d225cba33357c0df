"""A thread that shows the campaign to somebody, behind it: in order, never in its way, its failures told once."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

log = logging.getLogger("srlm")

PAUSE_S = 3.0
"""Between two tries of what failed because a server is away."""
PATIENCE_S = 600.0
"""Longest time that one thing is tried: a server may answer and yet never take it."""


class Background:
    """Does what it is handed, one thing after the other, in the context that it was made in.

    What fails because somebody is `away` is tried again, and the rest waits its turn: so the order stays, and nothing
    is missing once the server is back. What fails otherwise is left out. What is handed in may be done twice.
    """

    def __init__(self, name: str, consequence: str, away: Callable[[Exception], bool]) -> None:
        self._name, self._consequence, self._away = name, consequence, away
        self._context = copy_context()
        self._waiting: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._told = False
        self.failing = False
        """Whether the last try failed."""

    def put(self, call: Callable[..., Any], *args: Any) -> None:
        """Have something done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._waiting.put(partial(call, *args))

    def close(self, timeout_s: float) -> None:
        """Wait until everything is done, but no longer than this."""
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._over.set()
            log.warning("%s did not finish within %.0f s. %s", self._name, timeout_s, self._consequence)
        self._thread = None

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None and not self._over.is_set():
            self._do(call)

    def _do(self, call: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not self._over.is_set():
            try:
                self._context.run(call)
            except Exception as error:  # the seam: whoever watches may fail, the campaign goes on
                self.failing = True
                self._tell(error)
                if not self._away(error) or time.monotonic() > until:
                    return
                self._over.wait(PAUSE_S)
            else:
                self.failing = False
                return

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            log.warning("%s: %s: %s. %s", self._name, type(error).__name__, _first_line(error), self._consequence)
        log.debug("%s failed", self._name, exc_info=error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


class AtMost:
    """Says yes at most once in a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, float("-inf")

    def now(self) -> bool:
        """Whether the while is over; if so, the next one begins."""
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
