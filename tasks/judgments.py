"""judgments: the judge reads each response K times, while the next shards are still being answered.

One task run is one shard.
"""

from collections.abc import Callable

from srlm_core.store import Made
from tasks.shard import engine_died, shard_task


@shard_task(retries=1, retry_condition_fn=engine_died)
def judgments(name: str, make: Callable[[], Made]) -> Made:
    """Judge the responses of one shard."""
    return make()
