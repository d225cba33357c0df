"""responses: the policy answers each prompt N times; one task run is one shard."""

from collections.abc import Callable

from srlm_core.store import Made
from tasks.shard import engine_died, shard_task


@shard_task(retries=1, retry_condition_fn=engine_died)
def responses(name: str, make: Callable[[], Made]) -> Made:
    """Answer the prompts of one shard."""
    return make()
