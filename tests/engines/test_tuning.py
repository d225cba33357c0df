"""What the settings leave open is chosen by rule, what they say stays."""

import pytest

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.tuning import COMPILING_PAYS_FROM_S, choices, tuned


@pytest.fixture(params=["processor", "gpu"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(hardware, "gpus", lambda: ("0",) if request.param == "gpu" else ())
    monkeypatch.setattr(hardware, "cores", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(hardware, "free_memory", lambda: 20 * 2**30)
    return request.param


def test_what_is_set_stays(machine: str) -> None:
    config = EngineConfig(max_sequences=7, compiled=True, threads=1, kv_cache_gib=0.5)
    assert tuned(config, 1.0) == config


def test_a_processor_compiles_where_that_saves_more_than_it_costs(machine: str) -> None:
    on_gpu = machine == "gpu"
    assert tuned(EngineConfig(), COMPILING_PAYS_FROM_S * 0.99).compiled is on_gpu
    assert tuned(EngineConfig(), COMPILING_PAYS_FROM_S * 1.01).compiled is True
    assert tuned(EngineConfig()).compiled is on_gpu  # nobody knows how long: start at once
    assert pytest.approx(2200) == COMPILING_PAYS_FROM_S  # 110 s at a twentieth


def test_cores_and_memory_are_divided_among_the_replicas(machine: str) -> None:
    found = tuned(EngineConfig(replicas=2))
    if machine == "gpu":
        assert (found.max_sequences, found.threads, found.kv_cache_gib) == (256, None, None)
    else:
        assert (found.max_sequences, found.threads, found.kv_cache_gib) == (64, 2, 2.5)  # a quarter of 20, by two


def test_every_choice_says_why(machine: str) -> None:
    assert all(len(choice.why) > 5 for choice in choices(EngineConfig(), 60.0))
