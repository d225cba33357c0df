"""What the campaign came to: every model on prompts that it was never trained on, and the models against each other."""

from collections.abc import Callable
from typing import TypeVar

from prefect import flow

T = TypeVar("T")


@flow(flow_run_name="{name}", validate_parameters=False)
def evaluate(name: str, body: Callable[[], T]) -> T:
    """Measure the models that no iteration has opened, and let one frozen judge compare them all, in both orders."""
    return body()
