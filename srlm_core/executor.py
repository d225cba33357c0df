"""How the loop's work is run: here by plain threads; flows/ has the one that shows it to Prefect."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from srlm_core import interrupts
from srlm_core.errors import EngineDied

log = logging.getLogger("srlm")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Work(NamedTuple, Generic[T]):
    """One shard of one stage, or the training of one model: the unit that is shown, retried and resumed."""

    stage: str
    name: str
    run: Callable[[], T]


class Pending(Protocol[T_co]):
    """A result that will be there."""

    def result(self) -> T_co: ...


class Executor(Protocol):
    """Runs work that may overlap, and groups it into flows."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def submit(self, work: Work[T], after: Sequence[Pending[Any]] = ()) -> Pending[T]:
        """Start work once `after` is done. Submitted in an order in which nothing waits for what comes later."""
        ...

    def run(self, work: Work[T]) -> T:
        """Do work in this thread, so that Ctrl-C reaches it: a training has nothing to overlap with."""
        ...

    def flow(self, kind: str, name: str, run: Callable[[], T]) -> T:
        """Run a group of work under a name: bootstrap, iteration, evaluate."""
        ...

    def ask(self, question: str, decided: Callable[[], bool | None]) -> bool | None:
        """Ask a person whether to go on, unless it is `decided` meanwhile; None where nobody can be asked."""
        ...


class PlainExecutor:
    """Threads of this process. They wait for engines, so many of them cost nothing."""

    def __init__(self, workers: int = 8) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="srlm")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Work[T], after: Sequence[Pending[Any]] = ()) -> Pending[T]:
        # first in, first out: whatever a thread waits for was submitted earlier and holds a thread already
        def run() -> T:
            for earlier in after:
                earlier.result()
            return attempt(work)

        with interrupts.calm():
            future = self._pool.submit(run)
        interrupts.check()
        return _Waited(future)

    def run(self, work: Work[T]) -> T:
        return attempt(work)

    def flow(self, kind: str, name: str, run: Callable[[], T]) -> T:
        return run()

    def ask(self, question: str, decided: Callable[[], bool | None]) -> bool | None:
        return decided()


class _Waited(Generic[T]):
    """A future whose waiting ends when somebody asks to stop."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self) -> T:
        while not self._future.done():
            with interrupts.calm():
                wait([self._future], timeout=0.2)
            interrupts.check()
        return self._future.result()


def attempt(work: Work[T]) -> T:
    """Run work, unless somebody asked to stop; once more if its engine died under it.

    The engine's second death is an error.
    """
    interrupts.check()
    try:
        return work.run()
    except EngineDied as error:
        log.warning("%s: the engine died and is started again. %s", work.name, error)
        return work.run()
