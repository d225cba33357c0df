"""Several engines look like one."""

from collections import Counter
from pathlib import Path

import pytest
from engines.real import engine_of
from engines.test_child import alive
from engines.test_protocol import user

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware, open_engine
from srlm_core.engines.protocol import Completion, LogProb, Request, Sampling, TokenScores
from srlm_core.engines.replicas import Replicas, placements
from srlm_core.errors import ConfigError, ModelError


class Echo:
    """An engine that answers with who it is."""

    kind, context, capabilities = "echo", 100, frozenset({"generate", "token_scores", "logprobs"})

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def generate(self, requests):
        for request in requests:
            if request.prefix == "fail":
                raise ModelError("as asked")
            yield Completion(request.id, 0, self.name, 1, "stop")

    def logprobs(self, rows):
        return (LogProb(row.id, -1.0, 1, False) for row in rows)

    def token_scores(self, requests, choices):
        return (TokenScores(request.id, (0.0,) * len(choices)) for request in requests)


@pytest.fixture
def replicas(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "cores", lambda: (0, 1, 2))
    engine = Replicas(
        EngineConfig(kind="transformers", replicas=3, max_sequences=16), Path("model"), log=tmp_path / "log.txt"
    )
    engine._engines = [Echo("one"), Echo("two"), Echo("three")]
    with engine:
        yield engine


def test_every_request_is_answered_once_whoever_takes_it(replicas):
    asked = [Request(str(i)) for i in range(500)]
    assert sorted(c.request_id for c in replicas.generate(asked)) == sorted(r.id for r in asked)
    assert sorted(s.request_id for s in replicas.token_scores(asked, ["1", "2"])) == sorted(r.id for r in asked)


class Eager(Echo):
    """An engine that takes all it can get before it answers."""

    def generate(self, requests):
        for request in list(requests):
            for index in range(request.n):
                yield Completion(request.id, index, self.name, 1, "stop")


@pytest.mark.parametrize("n", [1, 4])
def test_a_short_list_is_divided_evenly_though_engines_look_ahead(replicas, n):
    replicas._engines = [Eager("one"), Eager("two"), Eager("three")]
    answered = Counter(done.text for done in replicas.generate([Request(str(i), n=n) for i in range(30)]))
    assert answered == {"one": 10 * n, "two": 10 * n, "three": 10 * n}


def test_the_error_of_one_replica_reaches_the_caller(replicas):
    with pytest.raises(ModelError, match="as asked"):
        list(replicas.generate([Request("a"), Request("b", prefix="fail"), Request("c")]))


def test_a_caller_that_stops_early_stops_the_pulling(replicas):
    pulled = []
    answers = replicas.generate(pulled.append(i) or Request(str(i)) for i in range(100_000))
    next(answers)
    answers.close()
    assert len(pulled) < 2000


def test_cores_and_gpus_are_divided_without_overlap(monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: tuple(range(8)))
    assert [p.cores for p in placements(EngineConfig(replicas=2))] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    monkeypatch.setattr(hardware, "gpus", lambda: ("0", "1", "2", "3"))
    assert [p.gpus for p in placements(EngineConfig(replicas=2, tensor_parallel=2))] == [("0", "1"), ("2", "3")]


def test_a_machine_too_small_for_the_replicas_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: (0, 1))
    with pytest.raises(ConfigError, match=r"engine\.replicas"):
        placements(EngineConfig(replicas=3))
    with pytest.raises(ConfigError, match=r"engine\.threads=2"):
        placements(EngineConfig(replicas=2, threads=2))
    monkeypatch.setattr(hardware, "gpus", lambda: ("0", "1"))
    with pytest.raises(ConfigError, match="at most 1 on 2 GPU"):
        placements(EngineConfig(replicas=2, tensor_parallel=2))


@pytest.mark.engine
@pytest.mark.slow
def test_two_real_engines_answer_as_one_and_both_end(tmp_path):
    if len(hardware.cores()) < 2:
        pytest.skip("needs two cores")
    with engine_of("transformers", tmp_path / "log", replicas=2) as engine:
        pids = [one._child.process.pid for one in engine._engines]
        asked = [
            Request(str(i), user(f"Say {i}."), sampling=Sampling(max_tokens=4), n=2, seed=256 * i) for i in range(40)
        ]
        assert len({(c.request_id, c.index) for c in engine.generate(asked)}) == 80
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_open_engine_opens_replicas_where_the_config_asks_for_several(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "cores", lambda: (0, 1))
    assert isinstance(
        open_engine(EngineConfig(kind="transformers", replicas=2), tmp_path, log=tmp_path / "log"), Replicas
    )
