"""Several child processes look like one engine."""

from collections import Counter, deque
from pathlib import Path

import pytest
from engines.echo import EchoEngine
from engines.real import engine_of
from engines.test_child import alive
from engines.test_protocol import user

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.protocol import Request, Sampling, ScoredText
from srlm_core.engines.replica import placements
from srlm_core.errors import ConfigError, EngineDied, ModelError


def echo(tmp_path, replicas=2, max_sequences=8):
    config = EngineConfig(kind="transformers", replicas=replicas, max_sequences=max_sequences)
    return EchoEngine(config, Path("model"), log=tmp_path / "log.txt")


@pytest.fixture
def engine(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "cores", lambda: (0, 1))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with echo(tmp_path) as opened:
        yield opened


def test_every_request_is_answered_once_whoever_takes_it(engine):
    asked = [Request(str(i), n=i % 3 + 1) for i in range(200)]
    done = list(engine.generate(iter(asked)))
    assert Counter(c.request_id for c in done) == {request.id: request.n for request in asked}
    assert {c.text for c in done} == {str(replica.child.process.pid) for replica in engine.replicas}
    assert {s.request_id for s in engine.token_scores(asked, ["1", "2"])} == {request.id for request in asked}
    assert [w.id for w in engine.logprobs([ScoredText("w", user("Hi."), "Ho.")])] == ["w"]
    assert [replica.owed for replica in engine.replicas] == [0, 0]


def test_the_refusal_of_one_request_reaches_its_caller_and_the_engine_goes_on(engine):
    with pytest.raises(ModelError, match="as asked"):
        list(engine.generate([Request("a"), Request("b", prefix="fail"), Request("c")]))
    assert len(list(engine.generate([Request("d")]))) == 1
    assert [replica.owed for replica in engine.replicas] == [0, 0]


def test_the_death_of_one_replica_ends_the_call_with_its_reason(engine):
    with pytest.raises(EngineDied, match="ended with code 3"):
        list(engine.generate(Request(str(i), prefix="die" if i == 20 else "") for i in range(60)))


def test_a_caller_that_stops_early_stops_the_pulling(engine):
    pulled = []
    answers = engine.generate(pulled.append(i) or Request(str(i)) for i in range(100_000))
    next(answers)
    answers.close()
    assert len(pulled) < 200
    assert [replica.owed for replica in engine.replicas] == [0, 0]


class Owing:
    """A replica that answers nothing."""

    def __init__(self, owed):
        self.owed = owed


@pytest.mark.parametrize(
    ("owed_to_others", "n_items", "taken"),
    [
        ([0, 0], 100, [10, 10]),  # a quarter of a batch ahead
        ([0, 0], 30, [8, 8]),  # no more than a batch of each is left, so nothing is asked for ahead
        ([0, 0], 10, [5, 5]),
        ([6, 0], 10, [2, 8]),  # to whom owes least, and no more than a batch
        ([0], 100, [16]),
        ([0], 10, [10]),
    ],
)
def test_whoever_owes_least_is_asked_and_the_end_of_a_list_is_left_to_who_has_room(
    tmp_path, owed_to_others, n_items, taken
):
    engine = echo(tmp_path, len(owed_to_others))
    asked = {Owing(owed): 0 for owed in owed_to_others}
    coming, feed = deque(), iter(range(n_items))
    while (replica := engine._with_room(asked, coming, feed)) is not None:
        coming.popleft()
        asked[replica] += 1
        replica.owed += 1
    assert list(asked.values()) == taken


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
        pids = [replica.child.process.pid for replica in engine.replicas]
        asked = [
            Request(str(i), user(f"Say {i}."), sampling=Sampling(max_tokens=4), n=2, seed=256 * i) for i in range(40)
        ]
        assert len({(c.request_id, c.index) for c in engine.generate(asked)}) == 80
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
