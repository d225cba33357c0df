"""Slots of a Prefect concurrency limit, held while a campaign uses a worker's devices.

Workers on several machines, and campaigns that are started while others run, share one count. A limit that is missing
is an error: Prefect's own default would be no limit at all.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from prefect.concurrency.sync import concurrency

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError

log = logging.getLogger("srlm")


def needed(config: RunConfig, limit: str) -> int:
    """Count the slots of a campaign: its GPUs, or itself where the limit is not of GPUs."""
    return config.engine.replicas * config.engine.tensor_parallel if limit == "gpu" else 1


class Slots:
    """Slots of one campaign, which it may give back for a while."""

    def __init__(self, limit: str, count: int) -> None:
        self._limit, self._count = limit, count
        self._occupied = ExitStack()

    def take(self) -> None:
        """Wait for them."""
        log.info("waiting for %d slot(s) of the concurrency limit %r", self._count, self._limit)
        # a server that is away for a while must not end a campaign: the lease is taken up again when it is back
        occupied = concurrency(self._limit, occupy=self._count, strict=True, raise_on_lease_renewal_failure=False)
        self._occupied.enter_context(occupied)

    def give_back(self) -> None:
        """Let others have them."""
        self._occupied.close()


_ours: ContextVar[Slots | None] = ContextVar("slots", default=None)


@contextmanager
def held(config: RunConfig) -> Iterator[None]:
    """Hold a campaign's slots of the limit that the worker names in SRLM_SLOTS; none where it names none.

    Waits for its turn. Raises ConfigError where the server has no such limit, or one that is too small for this
    campaign at any time.
    """
    limit = os.environ.get("SRLM_SLOTS")
    if not limit:
        yield
        return
    slots = Slots(limit, needed(config, limit))
    _require(limit, needed(config, limit))
    token = _ours.set(slots)
    try:
        slots.take()
        yield
    finally:
        slots.give_back()
        _ours.reset(token)


@contextmanager
def lent() -> Iterator[None]:
    """Give the campaign's slots back in here, where no engine is open, and wait for them again afterwards."""
    slots = _ours.get()
    if slots is not None:
        slots.give_back()
    yield
    if slots is not None:
        slots.take()


def _require(limit: str, slots: int) -> None:
    from prefect import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            found = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            raise ConfigError(
                f"expected a global concurrency limit {limit!r} on the Prefect server, as SRLM_SLOTS says, there is "
                f"none. Make it: prefect gcl create {limit} --limit N, N the devices of all workers together."
            ) from None
    if found.limit < slots:
        raise ConfigError(
            f"expected a concurrency limit {limit!r} of {slots} or more, as engine.replicas x engine.tensor_parallel "
            f"asks, it is {found.limit}. Raise it (prefect gcl update {limit} --limit N), or lower one of the two."
        )
