"""Where a campaign starts: M1 from the base model M0, by supervised fine-tuning on IFT + EFT (section 2.3)."""

from collections.abc import Callable
from typing import TypeVar

from prefect import flow

T = TypeVar("T")


@flow(flow_run_name="{name}", validate_parameters=False)
def bootstrap(name: str, body: Callable[[], T]) -> T:
    """Train M1 to follow instructions and to judge, and sft_baseline to follow instructions only."""
    return body()
