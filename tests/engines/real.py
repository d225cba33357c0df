"""The real small model and engines over it, started once for all tests that ask."""

import os
from pathlib import Path

from srlm_core.config import DEMO_MODEL, EngineConfig
from srlm_core.engines import open_engine
from srlm_core.engines.local import LocalEngine
from srlm_core.engines.models import resolve_model

CACHE = Path(os.environ.get("SRLM_CACHE") or Path(__file__).parents[2] / "runs" / ".cache" / "models")
CONTEXT = 512


def small_model() -> Path:
    return resolve_model(DEMO_MODEL, None, CACHE)


def engine_of(kind: str, log: Path, **settings) -> LocalEngine:
    config = EngineConfig(kind=kind, dtype="float32", context=CONTEXT, max_sequences=16, kv_cache_gib=1, **settings)
    return open_engine(config, small_model(), log=log)
