"""Replicas on a Ray cluster: the same datasets as here, whatever dies, and clear words where there is no room."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from engines.echo import EchoEngine
from engines.test_child import alive, wait_until

from srlm_core.config import EngineConfig
from srlm_core.engines import cluster, hardware, machine_of, open_engine
from srlm_core.engines.protocol import Request
from srlm_core.engines.scripted import base_model
from srlm_core.errors import ConfigError, EngineDied, ModelError

ROOT = Path(__file__).parents[2]


def test_a_replica_takes_gpus_where_there_are_some_and_half_of_one_if_that_is_all_it_uses():
    cpus, gpus = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}
    assert cluster.share(EngineConfig(), [cpus]) == {"CPU": 1.0}
    assert cluster.share(EngineConfig(threads=4), [cpus]) == {"CPU": 4.0}
    assert cluster.share(EngineConfig(tensor_parallel=4), [cpus, gpus]) == {"GPU": 4.0, "CPU": 1.0}
    assert cluster.share(EngineConfig(gpu_memory=0.45), [gpus]) == {"GPU": 0.45, "CPU": 1.0}
    assert cluster.share(EngineConfig(kind="scripted"), [gpus]) == {"CPU": 1.0}


def test_what_fits_is_counted_node_by_node():
    nodes = [{"CPU": 96.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 6.0}, {"CPU": 2.0}]
    assert cluster.fitting({"GPU": 4.0, "CPU": 1.0}, nodes) == 3  # 2 + 1: two halves on two nodes make no group
    assert cluster.fitting({"GPU": 1.0, "CPU": 16.0}, nodes) == 12
    assert cluster.fitting({"GPU": 0.45, "CPU": 1.0}, nodes) == 30  # 17 and 13
    assert cluster.fitting({"CPU": 1.0}, nodes) == 194
    assert cluster.fitting({"GPU": 16.0, "CPU": 1.0}, nodes) == 0


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379"])
def test_an_address_that_is_none_is_refused_with_what_one_looks_like(address):
    with pytest.raises(ConfigError, match=r"engine\.ray_address: expected HOST:PORT.*such as ray-head:6379"):
        cluster._reached(address)


def test_a_cluster_that_is_not_there_is_an_error_at_once(monkeypatch):
    config = EngineConfig(kind="scripted", placement="ray", ray_address=f"127.0.0.1:{_free_port()}")
    with pytest.raises(ConfigError, match=r"expected a Ray cluster at 127.*refused.*ray start --head"):
        cluster.require(config)


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """A Ray of our own, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        cluster.connect(None)
        yield
        cluster.leave()


@pytest.fixture
def engine(here, monkeypatch, tmp_path) -> Iterator[EchoEngine]:
    config = EngineConfig(kind="scripted", placement="ray", replicas=2, max_sequences=8)
    monkeypatch.setattr(hardware, "cores", lambda: (0, 1))
    with EchoEngine(config, Path("model"), log=tmp_path / "log.txt", site=cluster.RayCluster(config)) as opened:
        yield opened


def processes(engine: EchoEngine) -> list[int]:
    """Ask replicas who they are until all have said so."""
    found: set[str] = set()
    while len(found) < len(engine.replicas):
        found |= {done.text for done in engine.generate(Request(str(i)) for i in range(40))}
    return [int(pid) for pid in found]


@pytest.mark.cluster
@pytest.mark.parametrize("victim", ["actor", "child"])
def test_what_a_killed_replica_owed_is_answered_by_the_others_once_and_it_comes_back(engine, told, victim):
    before = processes(engine)
    pid = psutil.Process(before[0]).ppid() if victim == "actor" else before[0]
    seen = []
    for number, done in enumerate(engine.generate(Request(str(i), n=i % 3 + 1) for i in range(300))):
        seen.append((done.request_id, done.index))
        if number == 100:
            os.kill(pid, signal.SIGKILL)
    assert sorted(seen) == sorted((str(i), index) for i in range(300) for index in range(i % 3 + 1))
    assert wait_until(lambda: not alive(before[0]), 5)
    assert wait_until(lambda: all(replica.alive for replica in engine.replicas), 60)
    assert len(processes(engine)) == 2
    assert any("is started again, and what it owed is asked again" in words for words in told), told
    assert [replica.owed for replica in engine.replicas] == [0, 0]


@pytest.mark.cluster
def test_a_request_that_all_die_of_is_asked_no_more_than_three_times(engine):
    with pytest.raises(EngineDied, match="ended with code 3"):
        list(engine.generate(Request(str(i), prefix="die" if i == 20 else "") for i in range(60)))


@pytest.mark.cluster
def test_closing_ends_what_ran_there_and_gives_the_room_back(engine):
    pids = processes(engine)
    engine.__exit__(None, None, None)
    assert not any(map(alive, pids))
    with engine:
        assert len(processes(engine)) == 2


@pytest.mark.cluster
def test_too_small_a_cluster_is_an_error_that_says_what_it_has(here):
    cores = len(hardware.cores())
    config = EngineConfig(kind="scripted", placement="ray", replicas=cores + 1)
    with pytest.raises(ConfigError, match=rf"hold {cores + 1} × 1 CPU, each on one node, but it has {cores} CPU"):
        cluster.require(config)
    assert machine_of(EngineConfig(placement="ray"))._replace(free_memory=0) == hardware.here()._replace(free_memory=0)


@pytest.mark.cluster
def test_room_that_others_keep_is_waited_for_and_not_for_ever(here, monkeypatch, tmp_path, told):
    monkeypatch.setattr(cluster, "PATIENCE_S", 2.0)
    cores = len(hardware.cores())
    config = EngineConfig(kind="scripted", placement="ray", replicas=cores)
    with ExitStack() as opened:
        for _ in range(cluster._AT_ONCE):
            opened.enter_context(cluster.RayCluster(config))
        with pytest.raises(ConfigError, match=rf"to give {cores} × 1 CPU of .* within 2 s, but others hold"):
            opened.enter_context(cluster.RayCluster(config))
    assert any("which others hold" in words for words in told)


@pytest.mark.cluster
def test_a_model_that_is_not_on_the_node_is_refused_with_its_reason(here, tmp_path):
    config = EngineConfig(kind="scripted", placement="ray")
    with (
        pytest.raises(ModelError, match=r"expected a scripted model"),
        open_engine(config, tmp_path / "none", log=tmp_path / "log"),
    ):
        pass  # fmt: skip


@pytest.mark.cluster
def test_scripted_replicas_there_answer_what_the_engine_here_answers(here, tmp_path):
    model = base_model(tmp_path / "M0")
    asked = [Request(str(i), ({"role": "user", "content": f"Say {i}."},), n=3, seed=64 * i) for i in range(50)]
    config = EngineConfig(kind="scripted", placement="ray")
    with open_engine(config, model, log=tmp_path / "log") as there:
        answered = sorted(there.generate(asked))
    with open_engine(EngineConfig(kind="scripted"), model, log=tmp_path / "log") as plain:
        assert answered == sorted(plain.generate(asked))


# --- whole campaigns ------------------------------------------------------------------------------------------------


def campaign(root: Path, name: str, *settings: str) -> subprocess.Popen[bytes]:
    sets = [word for setting in settings for word in ("--set", setting)]
    words = ["run", "smoke", "--root", str(root), "--name", name, "--no-prefect", "--no-mlflow", *sets]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    with (root / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "flows.cli", *words], stdout=log, stderr=log, env=env)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(process: psutil.Process, name: str) -> bool:
    try:
        return name in " ".join(process.cmdline())
    except psutil.Error:
        return False


def parquet(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


@pytest.mark.cluster
def test_a_campaign_whose_actor_is_killed_ends_with_the_same_bytes_and_leaves_no_process(tmp_path):
    ray = ("engine.placement=ray", "engine.replicas=2") if len(hardware.cores()) > 1 else ("engine.placement=ray",)
    disturbed = campaign(tmp_path, "ray", "iterations=1", *ray)
    seen: dict[int, psutil.Process] = {}
    killed = None
    while disturbed.poll() is None:
        seen |= {process.pid: process for process in family(disturbed)}
        if not killed and list((tmp_path / "ray" / "iter_01").glob("responses/*.parquet")):
            killed = next((process for process in seen.values() if named(process, "ray::Host")), None)
            if killed is not None:
                killed.kill()
        time.sleep(0.1)
    words = (tmp_path / "ray.log").read_text()
    assert disturbed.returncode == 0, words
    assert killed is not None
    assert "started again" in words
    calm = campaign(tmp_path, "calm", "iterations=1")
    assert calm.wait() == 0
    assert parquet(tmp_path / "ray") == parquet(tmp_path / "calm")
    assert wait_until(lambda: not any(map(alive, seen)), 15)


@pytest.mark.cluster
def test_a_cluster_that_is_there_is_joined_and_left_as_it_was(here, tmp_path):
    import ray

    address = ray.get_runtime_context().gcs_address
    joined = campaign(tmp_path, "ray", "iterations=1", "engine.placement=ray", f'engine.ray_address="{address}"')
    calm = campaign(tmp_path, "calm", "iterations=1")
    assert (joined.wait(), calm.wait()) == (0, 0), (tmp_path / "ray.log").read_text()
    assert parquet(tmp_path / "ray") == parquet(tmp_path / "calm")
    assert [node["Alive"] for node in ray.nodes()] == [True]


@pytest.mark.cluster
def test_a_campaign_that_is_killed_takes_its_ray_and_its_replicas_with_it(tmp_path):
    killed = campaign(tmp_path, "ray", "engine.placement=ray", "iterations=3")
    try:
        assert wait_until(lambda: any(named(process, "scripted_replicas") for process in family(killed)), 300)
        pids = [process.pid for process in family(killed)]
    finally:
        killed.kill()
        killed.wait()
    assert wait_until(lambda: not any(map(alive, pids)), 20), [pid for pid in pids if alive(pid)]
