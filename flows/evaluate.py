"""What the campaign came to: every model on prompts that it was never trained on, and the models against each other."""

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import flow
from prefect.client.schemas.objects import State

from flows.ending import told

T = TypeVar("T")


@flow(flow_run_name="{name}", validate_parameters=False)
def evaluate(name: str, body: Callable[[], T]) -> T | State[Any]:
    """Measure the models that no iteration has opened, and let one frozen judge compare them all, in both orders."""
    return told(body)
