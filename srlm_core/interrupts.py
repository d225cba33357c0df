"""interrupts: Ctrl-C and SIGTERM end a campaign, wherever they meet it.

An exception that a signal raises can be swallowed on its way (by a destructor, or a callback of a library), and can
leave a lock of the standard library held for ever if it comes while one is being taken. So a signal is also written
down, whoever starts the next piece of work looks, and where the main thread waits for others nothing is raised at all.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# plain values and no Event: a handler must not take a lock that the thread it interrupts may hold
_asked = False
_calm = False


def listen() -> None:
    """Take SIGINT and SIGTERM as a wish to stop; call it in the main thread."""
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _hear)
    signal.signal(signal.SIGTERM, _hear)


def _hear(*_: object) -> None:
    global _asked
    _asked = True
    if not _calm:
        raise KeyboardInterrupt


def check() -> None:
    """Raise KeyboardInterrupt if somebody asked to stop."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def calm() -> Iterator[None]:
    """Let no signal raise in here, for a moment; `check` afterwards."""
    global _calm
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread alone
        return
    _calm = True
    try:
        yield
    finally:
        _calm = False
