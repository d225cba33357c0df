"""evaluation: a model answers and judges what it was never trained on, a frozen judge compares models.

One task run is one table.
"""

from collections.abc import Callable

from srlm_core.store import Made
from tasks.shard import engine_died, shard_task


@shard_task(retries=1, retry_condition_fn=engine_died)
def evaluation(name: str, make: Callable[[], Made]) -> Made:
    """Make one table of one model's evaluation, or of one comparison."""
    return make()
