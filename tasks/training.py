"""training: M1 by supervised fine-tuning, M_{t+1} by DPO on the pairs of iteration t; one task run is one model."""

from collections.abc import Callable

from srlm_core.backend import Model
from tasks.shard import shard_task


@shard_task()
def training(name: str, make: Callable[[], Model]) -> Model:
    """Train one model, or go on from its last checkpoint.

    Not retried: its process leaves a checkpoint, and the same command goes on from there.
    """
    return make()
