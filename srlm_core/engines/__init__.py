"""What runs a model, behind one protocol: vllm, transformers, openai, scripted; and trl, which trains."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.hardware import Machine
from srlm_core.engines.protocol import Engine
from srlm_core.engines.tuning import tuned
from srlm_core.errors import ConfigError

if TYPE_CHECKING:
    from srlm_core.engines.local import Site

Kind = Literal["vllm", "transformers", "openai", "scripted"]
Dtype = Literal["bfloat16", "float16", "float32"]
log = logging.getLogger("srlm")


def open_engine(
    config: EngineConfig,
    model: Path,
    *,
    log: Path,
    trust_remote_code: bool = False,
    sampling_seconds: float | None = None,
) -> Engine:
    """Return the engine that the config asks for, not yet started: entering it starts it.

    `model` is a plain checkpoint folder (for an endpoint, the name it knows the model by); `log` receives what the
    engine's process says; `sampling_seconds` is how long it is expected to be busy (engines/tuning.py).
    """
    kind = resolve_kind(config)
    config = config.model_copy(update={"kind": kind})
    if kind == "openai":
        from srlm_core.engines.openai import OpenAIEngine

        return OpenAIEngine(config, model)
    if kind == "scripted":
        return _scripted(config, model, log)
    from srlm_core.engines.models import is_reward_model  # it imports what runs as a module: not before it is run

    config = config.model_copy(update={"dtype": resolve_dtype(config)})
    config = tuned(config, sampling_seconds, machine_of(config))
    if is_reward_model(model):
        from srlm_core.engines.transformers import RewardEngine as Chosen
    elif kind == "vllm":
        from srlm_core.engines.vllm import VllmEngine as Chosen
    else:
        from srlm_core.engines.transformers import TransformersEngine as Chosen
    return Chosen(config, model, log=log, trust_remote_code=trust_remote_code, site=site_of(config))


def machine_of(config: EngineConfig) -> Machine:
    """Describe what an engine will run on. Raises ConfigError for a cluster that is not there, or is too small."""
    if config.placement == "local":
        return hardware.here()
    from srlm_core.engines import cluster

    return cluster.machine(config)


def site_of(config: EngineConfig) -> "Site":
    """Say where an engine's replicas will run. Raises ConfigError where they do not fit."""
    if config.placement == "local":
        from srlm_core.engines.local import ThisMachine

        return ThisMachine(config)
    from srlm_core.engines.cluster import RayCluster

    return RayCluster(config)


def _scripted(config: EngineConfig, model: Path, log: Path) -> Engine:
    """Run it in this process; on a cluster, as replicas there."""
    if config.placement == "local":
        from srlm_core.engines.scripted import ScriptedEngine

        return ScriptedEngine(config, model)
    from srlm_core.engines.scripted_replicas import ScriptedReplicas

    config = config.model_copy(update={"max_sequences": config.max_sequences or 64})
    return ScriptedReplicas(config, model, log=log, site=site_of(config))


def resolve_kind(config: EngineConfig) -> Kind:
    """Say which engine `auto` is there. Raises ConfigError for a vllm that was asked for and cannot run."""
    if config.kind == "auto":
        kind: Kind = "transformers" if machine_of(config).why_not_vllm else "vllm"
        log.info("engine: %s, because %s", kind, why_kind(config))
        return kind
    if config.kind == "vllm" and (obstacle := machine_of(config).why_not_vllm):
        raise ConfigError(
            f"engine.kind: expected an engine that can run here, got 'vllm', but {obstacle}. "
            "Set engine.kind=transformers."
        )
    return config.kind


def why_kind(config: EngineConfig | None = None) -> str:
    """Say in words why this machine, or the cluster's, gets the engine it gets."""
    if config is not None and config.kind != "auto":
        return "engine.kind asks for it"
    machine = machine_of(config or EngineConfig())
    if machine.why_not_vllm:
        return f"{machine.why_not_vllm}; transformers runs anywhere, more slowly"
    where = f"{machine.gpus} CUDA device(s)" if machine.gpus else f"this processor ({machine.cores} cores)"
    return f"vllm is installed and runs on {where}"


def resolve_dtype(config: EngineConfig) -> Dtype:
    """Say which number format `auto` is there: bfloat16 where it is multiplied natively, else float32.

    Elsewhere bfloat16 is emulated: ten times slower than float32 on a processor with AVX2 alone.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if machine_of(config).bfloat16 else "float32"
