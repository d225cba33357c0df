"""A wish to stop is neither lost nor held up, wherever it comes."""

import contextlib
import os
import signal
import threading
import time

import pytest

from srlm_core import interrupts
from srlm_core.executor import PlainExecutor, Work


@pytest.fixture(autouse=True)
def listening():
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    interrupts.listen()
    yield
    interrupts.listen()  # forgets what was asked
    for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(one, handler)


def ask(which=signal.SIGINT):
    os.kill(os.getpid(), which)
    time.sleep(0.01)  # the handler runs before the next line of the main thread


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_it_raises_at_once(which):
    with pytest.raises(KeyboardInterrupt):
        ask(which)


def test_one_that_was_swallowed_is_met_by_the_next_work():
    with contextlib.suppress(KeyboardInterrupt):  # as a destructor or a library's callback does
        ask()
    with PlainExecutor() as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.submit(Work("s", "n", lambda: 1)).result()
        with pytest.raises(KeyboardInterrupt):
            executor.run(Work("s", "n", lambda: 1))


def test_waiting_for_work_ends_soon_and_what_is_queued_is_not_begun():
    begun, release = [], threading.Event()

    def slow():
        begun.append(1)
        release.wait(10)

    with PlainExecutor(workers=1) as executor:
        first, second = (executor.submit(Work("s", str(n), slow)) for n in range(2))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            first.result()
        assert time.monotonic() - started < 5
        release.set()
        with pytest.raises(KeyboardInterrupt):
            second.result()
    assert begun == [1]


def test_in_calm_nothing_raises_until_it_is_looked_for():
    with interrupts.calm():
        ask()
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
