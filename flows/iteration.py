"""One turn of the loop: M_t makes its own training data, and M_{t+1} comes of it (section 2.4)."""

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import flow
from prefect.client.schemas.objects import State

from flows.ending import told

T = TypeVar("T")


@flow(flow_run_name="{name}", validate_parameters=False)
def iteration(name: str, body: Callable[[], T]) -> T | State[Any]:
    """The model writes prompts, answers each N times, judges its answers K times; DPO on its pairs trains the next.

    All under one engine: a shard's answers are judged while the next shards are still being sampled.
    """
    return told(body)
