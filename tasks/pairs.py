"""pairs: the best and the worst scored response to each prompt; one task run is one shard."""

from collections.abc import Callable

from srlm_core.store import Made
from tasks.shard import shard_task


@shard_task()
def pairs(name: str, make: Callable[[], Made]) -> Made:
    """Pair the responses of one shard. Table work: what fails here would fail again."""
    return make()
