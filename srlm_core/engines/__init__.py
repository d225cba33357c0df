"""What runs a model, behind one protocol: vllm, transformers, openai, scripted; and trl, which trains."""

import logging
from pathlib import Path
from typing import Literal

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.protocol import Engine
from srlm_core.engines.tuning import tuned
from srlm_core.errors import ConfigError

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
    if kind == "scripted":
        from srlm_core.engines.scripted import ScriptedEngine

        return ScriptedEngine(config, model)
    if kind == "openai":
        from srlm_core.engines.openai import OpenAIEngine

        return OpenAIEngine(config, model)
    from srlm_core.engines.models import is_reward_model  # it imports what runs as a module: not before it is run

    config = tuned(config.model_copy(update={"dtype": resolve_dtype(config)}), sampling_seconds)
    if is_reward_model(model):
        from srlm_core.engines.transformers import RewardEngine

        return RewardEngine(config, model, log=log, trust_remote_code=trust_remote_code)
    if kind == "vllm":
        from srlm_core.engines.vllm import VllmEngine

        return VllmEngine(config, model, log=log, trust_remote_code=trust_remote_code)
    from srlm_core.engines.transformers import TransformersEngine

    return TransformersEngine(config, model, log=log, trust_remote_code=trust_remote_code)


def resolve_kind(config: EngineConfig) -> Kind:
    """Say which engine `auto` is here. Raises ConfigError for a vllm that was asked for and cannot run."""
    if config.kind == "auto":
        kind: Kind = "transformers" if hardware.why_not_vllm() else "vllm"
        log.info("engine: %s, because %s", kind, why_kind(config))
        return kind
    if config.kind == "vllm" and (obstacle := hardware.why_not_vllm()):
        raise ConfigError(
            f"engine.kind: expected an engine that can run here, got 'vllm', but {obstacle}. "
            "Set engine.kind=transformers."
        )
    return config.kind


def why_kind(config: EngineConfig | None = None) -> str:
    """Say in words why this machine gets the engine it gets."""
    if config is not None and config.kind != "auto":
        return "engine.kind asks for it"
    if obstacle := hardware.why_not_vllm():
        return f"{obstacle}; transformers runs anywhere, more slowly"
    where = (
        f"{len(hardware.gpus())} CUDA device(s)"
        if hardware.gpus()
        else f"this processor ({len(hardware.cores())} cores)"
    )
    return f"vllm is installed and runs on {where}"


def resolve_dtype(config: EngineConfig) -> Dtype:
    """Say which number format `auto` is here: bfloat16 where it is multiplied natively, else float32.

    Elsewhere bfloat16 is emulated: ten times slower than float32 on a processor with AVX2 alone.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if hardware.multiplies_bfloat16() else "float32"
