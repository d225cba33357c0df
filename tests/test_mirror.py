"""Object storage beside the folder: what is lost here is fetched, and nothing is sampled again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import fsspec
import pytest
from conftest import TINY

from flows.running import carry_out
from srlm_core import loop, recipes, store
from srlm_core.backend import make_backend
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError, StoreError
from srlm_core.executor import PlainExecutor
from srlm_core.mirror import Mirror
from srlm_core.run import Run
from srlm_core.store import Campaign

SMALL = (*TINY, "iterations=1", "evaluation.models=none")


def run(root, *overrides, mirror=None):
    config = recipes.load("self_rewarding", "smoke", overrides=[*SMALL, *overrides])
    with ExitStack() as stack:
        campaign, executor = stack.enter_context(Campaign(root, "c")), stack.enter_context(PlainExecutor())
        campaign.logs.mkdir(exist_ok=True)
        store.write_json(campaign.config_path, config.model_dump(mode="json"))
        beside = stack.enter_context(Mirror(mirror, campaign, wait_s=0.01)) if mirror else None
        backend = make_backend(config, cache=root / ".cache", logs=campaign.logs)
        loop.self_reward(Run(config, campaign, executor, backend, [beside] if beside else [], beside))
    return campaign.folder


def start(root, url):
    config = recipes.load("self_rewarding", "smoke", overrides=[*SMALL, f'storage.mirror="{url}"'])
    carry_out(config, "c", root, redo=False, use_prefect=False, use_mlflow=False, as_json=True)


def parquet(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def engine_starts(folder):
    told = folder / "logs" / "engine_starts.txt"
    return told.read_text().split() if told.exists() else []


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory"])
def mirror(request, tmp_path, memory):
    return f"file://{tmp_path}/far" if request.param == "file" else "memory://far"


def test_a_finished_campaign_whose_folder_is_gone_comes_back_and_nothing_is_sampled(tmp_path, mirror):
    measured = ("evaluation.models=policy", "evaluation.attacks=false", "evaluation.refusals=false")
    folder = run(tmp_path / "runs", *measured, mirror=mirror)
    before = parquet(folder)
    markers = {path.parent.name: path.read_bytes() for path in folder.glob("models/*/complete.json")}
    assert set(markers) == {"sft_baseline", "M1", "M2"}
    shutil.rmtree(folder)
    run(tmp_path / "runs", *measured, mirror=mirror)
    assert engine_starts(folder) == []
    assert parquet(folder) == before
    assert {path.parent.name: path.read_bytes() for path in folder.glob("models/*/complete.json")} == markers


def test_the_mirror_holds_what_the_folder_holds_and_nothing_of_the_moment(tmp_path):
    folder = run(tmp_path / "runs", mirror=f"file://{tmp_path}/far")
    far = tmp_path / "far" / "c"
    assert parquet(far) == parquet(folder)
    assert (far / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not (far / "logs").exists()
    assert not [path for path in far.rglob("*") if path.name.startswith(".")]


def test_what_a_campaign_goes_on_to_make_is_copied_and_the_rest_is_not_copied_again(tmp_path):
    folder, far = run(tmp_path / "runs", mirror=f"file://{tmp_path}/far"), tmp_path / "far" / "c"
    copied = {path: path.stat().st_mtime_ns for path in far.rglob("*.parquet")}
    run(tmp_path / "runs", "iterations=2", mirror=f"file://{tmp_path}/far")
    assert parquet(far) == parquet(folder)
    assert (far / "models" / "M3" / "complete.json").exists()
    first = [path for path in copied if "evaluation" not in path.parts]
    assert {path: path.stat().st_mtime_ns for path in first} == {path: copied[path] for path in first}


def test_a_part_that_came_back_damaged_is_made_again(tmp_path):
    folder = run(tmp_path / "runs", mirror=f"file://{tmp_path}/far")
    before, part = parquet(folder), tmp_path / "far" / "c" / "iter_01" / "responses" / "part-00001.parquet"
    shutil.rmtree(folder)
    part.write_bytes(part.read_bytes()[:-20])
    run(tmp_path / "runs", mirror=f"file://{tmp_path}/far")
    assert engine_starts(folder) == ["M1"]
    assert parquet(folder) == before
    assert part.read_bytes() == (folder / "iter_01" / "responses" / part.name).read_bytes()


def test_a_model_that_came_back_with_other_weights_is_trained_again(tmp_path):
    folder = run(tmp_path / "runs", mirror=f"file://{tmp_path}/far")
    before, weights = parquet(folder), tmp_path / "far" / "c" / "models" / "M2" / "scripted.json"
    shutil.rmtree(folder)
    weights.write_text(json.dumps({"skill": 0.99, "lineage": []}))
    run(tmp_path / "runs", mirror=f"file://{tmp_path}/far")
    assert store.read_json(folder / "models" / "M2" / "scripted.json")["skill"] < 0.9
    assert parquet(folder) == before
    assert weights.read_bytes() == (folder / "models" / "M2" / "scripted.json").read_bytes()


def test_other_settings_take_nothing_from_the_mirror_that_they_change(tmp_path, memory):
    folder = run(tmp_path / "runs", mirror="memory://far")
    shutil.rmtree(folder)
    run(tmp_path / "runs", "responses.n=3", mirror="memory://far")
    asked = list(store.iter_rows(folder / "iter_01" / "responses"))
    assert {row["index"] for row in asked} == {0, 1, 2}
    assert len(list(store.iter_rows(folder / "iter_01" / "prompts"))) == 12


def test_fewer_passes_are_fetched_and_completed(tmp_path):
    folder = run(tmp_path / "runs", "judgments.k=2", mirror=f"file://{tmp_path}/far")
    before = [row["judgment_id"] for row in store.iter_rows(folder / "iter_01" / "judgments")]
    shutil.rmtree(folder)
    run(tmp_path / "runs", "judgments.k=3", mirror=f"file://{tmp_path}/far")
    after = [row["judgment_id"] for row in store.iter_rows(folder / "iter_01" / "judgments")]
    assert set(before) < set(after)
    usage = store.read_json(folder / "usage.json")
    assert usage["judgments"]["requests"] <= len(after) - len(before)


class Away:
    """A file system that is away for a while: the first `failures` writes raise."""

    def __init__(self, inner, failures):
        self._inner, self.failures = inner, failures

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_file(self, here, there):
        if not there.endswith("config.json") and self.failures > 0:
            self.failures -= 1
            raise ConnectionError("the storage is away")
        return self._inner.put_file(here, there)


def campaign_with_a_part(root):
    campaign = Campaign(root, "c")
    store.write_json(campaign.config_path, RunConfig().model_dump(mode="json"))
    store.write_json(campaign.model("M1") / "scripted.json", {"skill": 0.4})
    store.write_json(campaign.model("M1") / "complete.json", {"fingerprint": "f", "digest": "d"})
    store.write_json(campaign.model("M2") / "scripted.json", {"skill": 0.5})  # its training is not finished
    return campaign


def test_what_could_not_be_copied_is_told_and_tried_again_at_the_end(tmp_path, memory, told):
    campaign = campaign_with_a_part(tmp_path)
    with Mirror("memory://far", campaign, wait_s=0.01) as mirror:
        mirror._fs = Away(memory, failures=3)
        mirror("part", {})
        time.sleep(0.1)
    assert sorted(memory.find("/far")) == [
        "/far/c/config.json", "/far/c/models/M1/complete.json", "/far/c/models/M1/scripted.json",
    ]  # fmt: skip
    assert len(told) == 1
    assert "the storage is away" in told[0]
    assert mirror.holds(campaign.model("M1"))
    assert not mirror.holds(campaign.model("M2"))


def test_what_is_not_there_in_the_end_is_counted(tmp_path, memory, told):
    with Mirror("memory://far", campaign_with_a_part(tmp_path), wait_s=0.01) as mirror:
        mirror._fs = Away(memory, failures=1000)
    assert "2 files are not in memory://far/c yet" in told[-1]
    assert "the same command tries again" in told[-1]
    with Mirror("memory://far", campaign_with_a_part(tmp_path), wait_s=0.01):
        pass
    assert "/far/c/models/M1/complete.json" in memory.find("/far")


def test_a_marker_goes_there_last_and_away_first(tmp_path, memory):
    campaign, order = campaign_with_a_part(tmp_path), []

    class Watched(Away):
        def put_file(self, here, there):
            order.append(there.removeprefix("/far/c/"))
            return self._inner.put_file(here, there)

        def rm_file(self, there):
            order.append(f"away: {there.removeprefix('/far/c/')}")
            return self._inner.rm_file(there)

    with Mirror("memory://far", campaign, wait_s=0.01) as mirror:
        mirror._fs = Watched(memory, 0)
    assert order == ["models/M1/scripted.json", "models/M1/complete.json"]
    order.clear()
    store.write_json(campaign.model("M1") / "scripted.json", {"skill": 0.45})
    with Mirror("memory://far", campaign, wait_s=0.01) as mirror:
        mirror._fs = Watched(memory, 0)
    assert order == ["away: models/M1/complete.json", "models/M1/scripted.json", "models/M1/complete.json"]


def test_a_mirror_that_cannot_be_read_any_more_is_an_error_not_a_second_sampling(tmp_path, memory):
    campaign = campaign_with_a_part(tmp_path)
    with Mirror("memory://far", campaign, wait_s=0.01):
        pass
    (campaign.model("M1") / "complete.json").unlink()

    class Unreadable(Away):
        def get_file(self, there, here):
            raise ConnectionError("the storage is away")

    with Mirror("memory://far", campaign, wait_s=0.01) as mirror:
        mirror._fs = Unreadable(memory, 0)
        with pytest.raises(StoreError, match=r"expected to fetch models/M1/complete.json .* storage.mirror=null"):
            mirror.fetch(campaign.model("M1") / "complete.json")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("farstore://bucket/prefix", "pip install no_such_farfs"),
        ("nosuch://x", "expected a URL that fsspec knows, such as s3://bucket/prefix, got 'nosuch://x"),
    ],
)
def test_a_storage_that_cannot_be_asked_is_refused_before_anything_is_loaded(tmp_path, url, said):
    # s3 and s3fs in a place where they may be installed or not
    fsspec.register_implementation("farstore", "no_such_farfs.FarFileSystem", clobber=True, errtxt="Install it")
    with pytest.raises(ConfigError, match=said):
        start(tmp_path / "runs", url)
    assert not (tmp_path / "runs" / "c" / "bootstrap").exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=r"expected to (read|write) file://.*AWS_ACCESS_KEY_ID"):
        start(tmp_path / "runs", f"file://{tmp_path}/file")


def test_a_mirror_inside_the_campaigns_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="outside the campaigns' folder"):
        start(tmp_path / "runs", f"file://{tmp_path}/runs/far")


def test_a_password_in_the_url_is_refused():
    with pytest.raises(ConfigError, match="without a password"):
        recipes.load("self_rewarding", "smoke", overrides=['storage.mirror="ftp://me:secret@host/x"'])


@pytest.mark.cluster
def test_killed_in_the_middle_and_the_folder_gone_it_goes_on_from_the_mirror(tmp_path):
    want = parquet(run(tmp_path / "undisturbed", "prompts.target=60"))
    command = [sys.executable, "-m", "flows.cli", "run", "self_rewarding", "--size", "smoke", "--name", "c"]
    command += ["--root", str(tmp_path / "runs"), "--no-prefect", "--no-mlflow"]
    for one in (*SMALL, "prompts.target=60", f'storage.mirror="file://{tmp_path}/far"'):
        command += ["--set", one]
    part = tmp_path / "far" / "c" / "iter_01" / "responses" / "part-00000.parquet"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not part.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "runs")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert parquet(tmp_path / "runs" / "c") == want
