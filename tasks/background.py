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

PATIENCE = 3
"""Failures in a row after which nothing more is tried: a server that is gone must not hold up the end."""


class Background:
    """Does what it is handed, one thing after the other, in the context that it was made in."""

    def __init__(self, name: str, consequence: str) -> None:
        self._name, self._consequence = name, consequence
        self._context = copy_context()
        self._waiting: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._in_a_row, self._told = 0, False

    @property
    def gave_up(self) -> bool:
        return self._in_a_row >= PATIENCE

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
            log.warning("%s did not finish within %.0f s. %s", self._name, timeout_s, self._consequence)
        self._thread = None

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            if self.gave_up:
                continue
            try:
                self._context.run(call)
                self._in_a_row = 0
            except Exception as error:  # the seam: whoever watches may fail, the campaign goes on
                self._in_a_row += 1
                self._tell(error)

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
