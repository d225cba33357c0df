"""How an engine is set up where the settings leave it open, and why.

On a processor by what was measured (benchmarks/settings.py); a GPU gets vLLM's own defaults, unmeasured here so far.
"""

from typing import Any, NamedTuple

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.hardware import Machine

_GIB = 2**30


class Choice(NamedTuple):
    """One setting of the engine, as it will be."""

    setting: str
    value: Any
    why: str


COMPILING_S, COMPILING_SAVES = 110.0, 0.05
"""What compiling adds to an engine's start, and the share of the sampling time that it saves: the 135M model on two
AVX2 cores, one run each."""
COMPILING_PAYS_FROM_S = COMPILING_S / COMPILING_SAVES
"""Seconds of sampling from which compiling saves more than it costs."""


def choices(
    config: EngineConfig, sampling_seconds: float | None = None, machine: Machine | None = None
) -> list[Choice]:
    """Return threads, batch, KV cache and compilation; what is set stays as it is.

    `sampling_seconds` is how long one engine is expected to be busy; None where nobody knows. `machine` is where it
    runs; None = here.
    """
    machine = machine or hardware.here()
    on_gpu = bool(machine.gpus)
    made = [_sequences(config, on_gpu), _compiled(config, on_gpu, sampling_seconds)]
    return made if on_gpu else [_threads(config, machine), *made, _kv_cache(config, machine)]


def tuned(config: EngineConfig, sampling_seconds: float | None = None, machine: Machine | None = None) -> EngineConfig:
    """Fill in what the settings leave open."""
    made = choices(config, sampling_seconds, machine)
    return config.model_copy(update={choice.setting: choice.value for choice in made if choice.value is not None})


def _threads(config: EngineConfig, machine: Machine) -> Choice:
    if config.threads:
        return Choice("threads", config.threads, "as set")
    each = max(1, machine.cores // config.replicas)
    return Choice("threads", each, f"all {machine.cores} cores over {config.replicas} replica(s)")


def _sequences(config: EngineConfig, on_gpu: bool) -> Choice:
    if config.max_sequences:
        return Choice("max_sequences", config.max_sequences, "as set")
    if on_gpu:
        return Choice("max_sequences", 256, "vLLM's own default below 70 GiB of GPU memory; more is not measured here")
    return Choice("max_sequences", 64, "a processor's products are as fast as they get from 64 rows on")


def _compiled(config: EngineConfig, on_gpu: bool, sampling_seconds: float | None) -> Choice:
    if config.compiled is not None:
        return Choice("compiled", config.compiled, "as set")
    if on_gpu:
        return Choice("compiled", True, "vLLM's own default")
    minutes = COMPILING_PAYS_FROM_S / 60
    rule = f"costs about {COMPILING_S:.0f} s, saves {COMPILING_SAVES:.0%}: pays from {minutes:.0f} min of sampling"
    if sampling_seconds is None:
        return Choice("compiled", False, f"{rule}; how much there will be, the recipe says")
    long_enough = sampling_seconds > COMPILING_PAYS_FROM_S
    return Choice("compiled", long_enough, f"{rule}; expected are {sampling_seconds / 60:.1f}")


def _kv_cache(config: EngineConfig, machine: Machine) -> Choice:
    if config.kv_cache_gib:
        return Choice("kv_cache_gib", config.kv_cache_gib, "as set")
    free = machine.free_memory / _GIB
    room = min(8.0, free / 4) / config.replicas
    return Choice("kv_cache_gib", round(room, 2), f"a quarter of the {free:.0f} GiB free, at most 8, over the replicas")
