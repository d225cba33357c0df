"""Slots of a Prefect concurrency limit, held while a campaign uses a worker's devices.

Workers on several machines, and campaigns that are started while others run, share one count. A limit that is missing
is an error: Prefect's own default would be no limit at all.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.concurrency.sync import concurrency

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError

log = logging.getLogger("srlm")


def needed(config: RunConfig, limit: str) -> int:
    """Count the slots of a campaign: its GPUs, or itself where the limit is not of GPUs."""
    return config.engine.replicas * config.engine.tensor_parallel if limit == "gpu" else 1


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
    slots = needed(config, limit)
    _require(limit, slots)
    log.info("waiting for %d slot(s) of the concurrency limit %r", slots, limit)
    # a server that is away for a while must not end a campaign: the lease is taken up again when it is back
    with concurrency(limit, occupy=slots, strict=True, raise_on_lease_renewal_failure=False):
        yield


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
