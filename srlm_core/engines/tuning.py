"""How an engine is set up where the settings leave it open, and why: by what benchmarks/settings.py measured."""

from typing import Any, NamedTuple

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware

_GIB = 2**30


class Choice(NamedTuple):
    """One setting of the engine, as it will be."""

    setting: str
    value: Any
    why: str


class Compiling(NamedTuple):
    """What compiling a model costs at its engine's start, and what it gives."""

    seconds: float
    gain: float
    """Share of the sampling time that it saves."""

    @property
    def pays_from(self) -> float:
        """Seconds of sampling from which compiling saves more than it costs."""
        return self.seconds / self.gain


ON_CPU = Compiling(seconds=110, gain=0.05)
ON_GPU = Compiling(seconds=45, gain=0.3)  # the vLLM project's own figures for models of a few billion parameters


def choices(config: EngineConfig, sampling_seconds: float | None = None) -> list[Choice]:
    """Return threads, batch, KV cache and compilation; what is set stays as it is.

    `sampling_seconds` is how long one engine is expected to be busy; None where nobody knows.
    """
    on_gpu = bool(hardware.gpus())
    made = [_sequences(config, on_gpu), _compiled(config, on_gpu, sampling_seconds)]
    return made if on_gpu else [_threads(config), *made, _kv_cache(config)]


def tuned(config: EngineConfig, sampling_seconds: float | None = None) -> EngineConfig:
    """Fill in what the settings leave open."""
    return config.model_copy(
        update={
            choice.setting: choice.value for choice in choices(config, sampling_seconds) if choice.value is not None
        }
    )


def _threads(config: EngineConfig) -> Choice:
    if config.threads:
        return Choice("threads", config.threads, "as set")
    each = max(1, len(hardware.cores()) // config.replicas)
    return Choice("threads", each, f"all {len(hardware.cores())} cores over {config.replicas} replica(s)")


def _sequences(config: EngineConfig, on_gpu: bool) -> Choice:
    if config.max_sequences:
        return Choice("max_sequences", config.max_sequences, "as set")
    if on_gpu:
        return Choice("max_sequences", 256, "a GPU gains from every sequence until its KV cache is full")
    return Choice("max_sequences", 64, "a processor's products are as fast as they get from 64 rows on")


def _compiled(config: EngineConfig, on_gpu: bool, sampling_seconds: float | None) -> Choice:
    if config.compiled is not None:
        return Choice("compiled", config.compiled, "as set")
    cost = ON_GPU if on_gpu else ON_CPU
    rule = (
        f"costs about {cost.seconds:.0f} s, saves {cost.gain:.0%}: pays from {cost.pays_from / 60:.0f} min of sampling"
    )
    if sampling_seconds is None:
        return Choice("compiled", False, f"{rule}, and nobody knows how much there will be")
    return Choice("compiled", sampling_seconds > cost.pays_from, f"{rule}; expected are {sampling_seconds / 60:.1f}")


def _kv_cache(config: EngineConfig) -> Choice:
    if config.kv_cache_gib:
        return Choice("kv_cache_gib", config.kv_cache_gib, "as set")
    free = hardware.free_memory() / _GIB
    room = min(8.0, free / 4) / config.replicas
    return Choice("kv_cache_gib", round(room, 2), f"a quarter of the {free:.0f} GiB free, at most 8, over the replicas")
