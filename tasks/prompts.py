"""prompts: the generator writes new prompts from a few examples, and the similarity filter keeps the new ones.

One task run is one shard.
"""

from collections.abc import Callable

from srlm_core.store import Made
from tasks.shard import engine_died, shard_task


@shard_task(retries=1, retry_condition_fn=engine_died)
def prompts(name: str, make: Callable[[], Made]) -> Made:
    """Write the prompts of one shard. Shards go one after the other: the filter looks back."""
    return make()
