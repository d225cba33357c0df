"""layout: how shards, replicas and training ranks would lie over a cluster's GPUs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError

STATE_BYTES = 16
"""Of a parameter in training: float32 weights, gradients and two Adam moments. Sharded over the ranks (FSDP)."""
ASSUMED_SEQUENCES = 256
"""Sequences of a replica on a GPU, where engine.max_sequences leaves it open."""


class Line(NamedTuple):
    """One quantity: what, how much, and the arithmetic behind it."""

    what: str
    value: float
    unit: str
    arithmetic: str


class Layout(NamedTuple):
    """A cluster, as a campaign would use it."""

    nodes: int
    replicas: int
    """Each on the GPUs of one node."""
    ranks: int
    """GPUs that train: a step's batch is divided evenly among them."""


def lay(config: RunConfig, gpus: int, per_node: int) -> Layout:
    """Divide nodes of `per_node` GPUs, the last one perhaps with fewer, among replicas and ranks.

    Raises ConfigError where no node holds a replica.
    """
    full, rest = divmod(gpus, per_node)
    group = config.engine.tensor_parallel
    replicas = full * (per_node // group) + rest // group
    if not replicas:
        most = min(gpus, per_node)
        raise ConfigError(
            f"engine.tensor_parallel: expected at most {most}, the GPUs of one node, got {group}. Lower it, or plan "
            "for more with --gpus and --gpus-per-node."
        )
    batch = math.gcd(config.training.sft.batch_size, config.training.dpo.batch_size)
    ranks = max(n for n in range(1, min(gpus, batch) + 1) if batch % n == 0)
    return Layout(full + bool(rest), replicas, ranks)


def lines(
    config: RunConfig, laid: Layout, gpus: int, parameters: int, weights_bytes: int, prompts: Sequence[int]
) -> list[Line]:
    """Spell a layout out, with the settings that make it so."""
    engine, gib = config.engine, 1024**3
    used = laid.replicas * engine.tensor_parallel
    where = "engine.placement=ray, " if laid.nodes > 1 else ""
    held = f"{engine.tensor_parallel} GPU(s) each, {gpus - used} idle: {where}engine.replicas={laid.replicas}"
    most = max(prompts, default=0)
    shards = math.ceil(most / engine.shard_rows)
    each = f"{most} prompts by engine.shard_rows={engine.shard_rows}: {shards / laid.replicas:.3g} a replica"
    at_once = laid.replicas * (engine.max_sequences or ASSUMED_SEQUENCES)
    rows = engine.shards_in_flight * engine.shard_rows * config.responses.n
    flying = math.ceil(at_once / (engine.shard_rows * config.responses.n))
    full = "fill" if rows >= at_once else f"do not fill, engine.shards_in_flight={flying} would,"
    asked = f"{engine.shards_in_flight} shards × {engine.shard_rows} × {config.responses.n} {full} {at_once} places"
    launcher = "ray" if laid.ranks > gpus / laid.nodes else "torchrun"
    step = math.gcd(config.training.sft.batch_size, config.training.dpo.batch_size)
    trained = f"a step of {step} rows, {step // laid.ranks} each, {gpus - laid.ranks} GPU(s) idle: "
    trained += f"training.launcher={launcher}, training.ranks={laid.ranks}" if laid.ranks > 1 else "one process"
    of_state = f"{parameters:,} parameters × {STATE_BYTES} bytes over {laid.ranks} (FSDP); activations come on top"
    return [
        Line("nodes", laid.nodes, "nodes", f"{gpus} GPUs"),
        Line("replicas", laid.replicas, "replicas", held),
        Line("weights on a GPU", weights_bytes / engine.tensor_parallel / gib, "GiB", "of a replica, without KV cache"),
        Line("shards", shards, "shards", each),
        Line("responses in flight", rows, "responses", asked),
        Line("training ranks", laid.ranks, "GPUs", trained),
        Line("training on a GPU", parameters * STATE_BYTES / laid.ranks / gib, "GiB", of_state),
    ]
