"""What MLflow holds of a campaign: each thing once, in its place, and the models come back."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.campaign import run_campaign
from srlm_core import recipes, store
from srlm_core.backend import make_backend
from srlm_core.engines.scripted import skill_of
from srlm_core.errors import ConfigError, ModelError
from srlm_core.store import Campaign
from tasks.background import Background
from tasks.tracking import Point, Record, Written, connect, restore_model, tracking_uri

TINY = (
    "prompts.target=8", "engine.shard_rows=4", "seed_data.ift_rows=24", "seed_data.eft_groups=4",
    "evaluation.prompts=8", "evaluation.heldout_groups=6", "evaluation.text_judgments=8",
    "evaluation.bootstrap_samples=20",
)  # fmt: skip


class Recorded(NamedTuple):
    """A root with a campaign in it that MLflow has recorded."""

    root: Path
    uri: str

    @property
    def client(self) -> Any:
        return connect(self.uri)

    def runs(self, **tags: str) -> list[Any]:
        found = [run for e in self.client.search_experiments() for run in self.client.search_runs([e.experiment_id])]
        return [run for run in found if tags.items() <= run.data.tags.items()]

    def parent(self, name: str = "c") -> Any:
        (found,) = self.runs(**{"srlm.campaign": name, "srlm.role": "campaign"})
        return found

    def points(self, run: Any, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, metric)]

    def models(self) -> dict[str, Any]:
        experiment = self.client.get_experiment_by_name("srlm").experiment_id
        return {model.name: model for model in self.client.search_logged_models([experiment])}

    def everything(self) -> Any:
        """All that was logged, to compare before and after."""
        runs = {run.info.run_id: run for run in self.runs()}
        metrics = {key: {name: self.points(run, name) for name in run.data.metrics} for key, run in runs.items()}
        params = {key: run.data.params for key, run in runs.items()}
        inputs = {
            key: sorted((given.dataset.name, given.dataset.digest) for given in run.inputs.dataset_inputs)
            for key, run in runs.items()
        }
        models = {model.model_id: (name, dict(model.tags)) for name, model in self.models().items()}
        return metrics, params, inputs, models, self.versions(), self.champions()

    def versions(self) -> list[tuple[str, str, str, dict[str, str]]]:
        """The registered versions: name, number, model, tags."""
        found = self.client.search_model_versions()
        return sorted((one.name, one.version, one.tags["srlm.model"], dict(one.tags)) for one in found)

    def champions(self) -> dict[str, str]:
        """Registered model to the M_t that is its champion."""
        named = {model.name: model.aliases.get("champion") for model in self.client.search_registered_models()}
        return {
            name: self.client.get_model_version_by_alias(name, "champion").tags["srlm.model"]
            for name, version in named.items()
            if version is not None
        }


def run(root: Path, *overrides: str, name: str = "c") -> Path:
    config = recipes.load("smoke", overrides=[*TINY, *overrides])
    with Campaign(root, name) as campaign:
        campaign.logs.mkdir(exist_ok=True)
        store.write_json(campaign.config_path, config.model_dump(mode="json"))
        backend = make_backend(config, cache=root / ".cache", logs=campaign.logs)
        run_campaign(config, campaign, backend=backend, use_prefect=False, use_mlflow=True)
    return campaign.folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    root = tmp_path_factory.mktemp("recorded")
    run(root)
    return Recorded(root, f"sqlite:///{root / 'mlflow.db'}")


def test_a_campaign_is_a_run_with_a_child_for_each_training(recorded: Recorded) -> None:
    parent = recorded.parent()
    assert parent.info.status == "FINISHED"
    assert parent.data.params["responses.n"] == "4"
    assert parent.data.tags["config_hash"]
    children = recorded.runs(**{"mlflow.parentRunId": parent.info.run_id})
    names = {child.info.run_name for child in children}
    assert names == {"bootstrap sft_baseline", "bootstrap M1", "iteration 1", "iteration 2"}
    assert {child.info.status for child in children} == {"FINISHED"}


def test_steps_of_the_campaign_are_iterations_and_those_of_a_training_its_optimizer_steps(recorded: Recorded) -> None:
    parent = recorded.parent()
    assert [step for step, _ in recorded.points(parent, "judgments/readable_rate")] == [1, 2]
    assert sorted(step for step, _ in recorded.points(parent, "evaluation/judge_pairwise_accuracy")) == [0, 1, 2, 3]
    assert [step for step, _ in recorded.points(parent, "responses/tokens_so_far")] == [1, 2, 3]
    assert recorded.points(parent, "judgments/engine_hours_so_far")
    for child in recorded.runs(**{"mlflow.parentRunId": parent.info.run_id}):
        log = {"iteration 1": "iter_01/training", "iteration 2": "iter_02/training"}
        work_dir = log.get(child.info.run_name, f"bootstrap/training/{child.info.run_name.rpartition(' ')[2]}")
        curve = store.read_part(recorded.root / "c" / work_dir / "log.parquet").to_pylist()
        assert sorted(recorded.points(child, "training/loss")) == [(row["step"], row["loss"]) for row in curve]
        assert recorded.points(child, "training/learning_rate")


def test_what_a_model_was_trained_on_is_there_by_digest_without_its_rows(recorded: Recorded) -> None:
    (child,) = recorded.runs(**{"srlm.model": "M2"})
    given = {item.dataset.name: item.dataset for item in child.inputs.dataset_inputs}
    assert given.keys() == {f"iter_01/{name}" for name in ("prompts", "responses", "judgments", "pairs")}
    parts = store.parts(recorded.root / "c" / "iter_01" / "pairs")
    stamps = [store.stamp_of(path) for path in parts]
    assert given["iter_01/pairs"].digest == store.digest(*[stamp.digest for stamp in stamps if stamp])


def test_every_model_is_logged_with_its_digest_its_origin_and_its_numbers(recorded: Recorded) -> None:
    models = recorded.models()
    assert models.keys() == {"c-M0", "c-sft_baseline", "c-M1", "c-M2", "c-M3"}
    digests = {
        name: store.read_json(recorded.root / "c/models" / name / "complete.json")["digest"] for name in ("M1", "M2")
    }
    assert models["c-M2"].tags["digest"] == digests["M2"]
    assert models["c-M2"].tags["trained_from"] == f"M1 {digests['M1']}"
    measured = {metric.key for metric in models["c-M2"].metrics}
    assert {"evaluation/judge_pairwise_accuracy", "evaluation/win_rate_vs_M1"} <= measured


def test_the_report_and_the_settings_are_artifacts(recorded: Recorded) -> None:
    listed = {item.path for item in recorded.client.list_artifacts(recorded.parent().info.run_id)}
    assert {"config.json", "timings.json", "usage.json"} <= listed
    assert (recorded.root / "mlartifacts").is_dir()


def test_the_same_campaign_again_doubles_nothing(recorded: Recorded) -> None:
    before = recorded.everything()
    run(recorded.root)
    assert recorded.everything() == before


SMALL = ("iterations=1", "evaluation.attacks=false", "evaluation.refusals=false", "evaluation.own_groups=0")


def test_every_model_is_a_version_and_without_gates_none_is_champion(recorded: Recorded) -> None:
    versions = [(number, model) for name, number, model, _ in recorded.versions() if name == "c"]
    assert versions == [(1, "M1"), (2, "M2"), (3, "M3")]
    assert "c" not in recorded.champions()
    found = recorded.client.get_model_version("c", "2")
    assert found.source == recorded.models()["c-M2"].artifact_location


@pytest.mark.slow
def test_champion_moves_to_what_passed_its_gates_and_a_failed_gate_leaves_it(tmp_path: Path) -> None:
    here = Recorded(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    # M1 is held by what it makes, M2, the last one, by its length alone
    limits = ("gates.max_tie_rate=1", "gates.stop=false")
    run(tmp_path, *SMALL, *limits, "gates.max_length_growth=0.1")
    assert here.champions() == {"c": "M1"}
    parent = here.parent()
    assert here.points(parent, "gate/tie_rate") == [(1, 1.0)]
    assert here.points(parent, "gate/length_growth") == [(2, 0.0)]
    assert "1 failed: length_growth" in parent.data.tags["gate/M2"]
    before = here.everything()
    run(tmp_path, *SMALL, *limits, "gates.max_length_growth=0.1")
    assert here.everything() == before
    run(tmp_path, *SMALL, *limits, "gates.max_length_growth=50")
    assert here.champions() == {"c": "M2"}
    # somebody moves it by hand, and the same campaign again takes it from nobody
    here.client.set_registered_model_alias("c", "champion", "1")
    run(tmp_path, *SMALL, *limits, "gates.max_length_growth=50")
    assert here.champions() == {"c": "M1"}
    assert [(number, model) for _, number, model, _ in here.versions()] == [(1, "M1"), (2, "M2")]


@pytest.mark.slow
def test_campaigns_under_one_registered_name_are_versions_of_one_model(tmp_path: Path) -> None:
    here = Recorded(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    asked = ('evaluation.models="none"', "iterations=1", "gates.max_tie_rate=1", 'tracking.registered_model="team"')
    for name in ("old", "new"):
        run(tmp_path, *asked, name=name)
    assert {name for name, *_ in here.versions()} == {"team"}
    assert len(here.versions()) == 4
    champion = here.client.get_model_version_by_alias("team", "champion")
    assert (champion.tags["srlm.campaign"], champion.tags["srlm.model"]) == ("new", "M1")
    run(tmp_path, *asked, name="old")  # gone over again, it takes nothing back
    assert here.client.get_model_version_by_alias("team", "champion").version == champion.version


def test_the_first_pairs_of_a_training_are_a_table_that_does_not_grow(recorded: Recorded, tmp_path: Path) -> None:
    (child,) = recorded.runs(**{"srlm.campaign": "c", "srlm.model": "M2"})
    record = Record(recorded.uri, recipes.load("smoke", overrides=TINY), Campaign(recorded.root, "c"))
    record.trained("M2")
    kept = recorded.client.download_artifacts(child.info.run_id, "pairs.json", str(tmp_path))
    table = json.loads(Path(kept).read_text())
    shown = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    rows = store.read_part(recorded.root / "c" / "iter_01" / "pairs" / "part-00000.parquet").to_pylist()
    assert len(shown) == min(5, len(rows)) > 0
    assert [row["pair"] for row in shown] == [row["pair_id"] for row in rows[:5]]
    assert [row["chosen"] for row in shown] == [row["chosen"] for row in rows[:5]]


def test_a_training_that_went_on_after_a_crash_has_one_curve(tmp_path: Path, recorded: Recorded) -> None:
    config = recipes.load("smoke", overrides=TINY)
    shutil.copytree(recorded.root / "c", tmp_path / "d")
    (tmp_path / "d" / "mlflow.json").unlink()
    for _ in range(2):  # the second process finds what the first one has written
        record = Record(recorded.uri, config, Campaign(tmp_path, "d"))
        record.grow("M1", [Point("training/loss", 0.5, 1)])
    record.trained("M1")
    record.trained("M1")
    (child,) = recorded.runs(**{"srlm.campaign": "d", "srlm.model": "M1"})
    steps = store.read_json(tmp_path / "d" / "models" / "M1" / "complete.json")["steps"]
    assert steps > 1
    assert [step for step, _ in recorded.points(child, "training/loss")] == list(range(1, steps + 1))
    record.end("KILLED")


def test_a_model_comes_back_as_it_was(recorded: Recorded, tmp_path: Path) -> None:
    target = tmp_path / "restored" / "M2"
    restore_model(recorded.uri, recorded.parent().info.run_id, "M2", target, digest_of=digest)
    original = recorded.root / "c" / "models" / "M2"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }
    with pytest.raises(ModelError, match="expected a logged model 'M9'"):
        restore_model(recorded.uri, recorded.parent().info.run_id, "M9", target, digest_of=digest)


def test_a_checkpoint_over_the_limit_is_referenced_and_its_digest_verified(recorded: Recorded, tmp_path: Path) -> None:
    small = ("iterations=1", 'evaluation.models="none"')
    folder = run(recorded.root, *small, "tracking.upload_below_mb=0", name="large")
    logged = recorded.models()["large-M2"]
    assert logged.tags["stored"] == "false"
    assert logged.tags["path"] == str(folder / "models" / "M2")
    assert not list((recorded.root / "mlartifacts" / "models" / logged.model_id).rglob("*.json"))
    parent = recorded.parent("large").info.run_id
    restored = restore_model(recorded.uri, parent, "M2", tmp_path / "M2", digest_of=digest)
    assert skill_of(restored) == skill_of(folder / "models" / "M2")
    store.write_json(folder / "models" / "M2" / "scripted.json", {"skill": 0.9})
    with pytest.raises(ModelError, match="trained again or damaged"):
        restore_model(recorded.uri, parent, "M2", tmp_path / "again", digest_of=digest)


def digest(folder: Path) -> str:
    return store.digest("scripted", skill_of(folder))


def test_a_server_that_is_not_there_at_the_start_ends_it_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MLflow server at http://127\.0\.0\.1:9.*refused.*--no-mlflow"):
        run(tmp_path, "iterations=1", 'tracking.mlflow_uri="http://127.0.0.1:9"', 'evaluation.models="none"')
    assert not (tmp_path / "c" / "models").exists()


def test_what_was_missed_is_made_up_for(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_without_mlflow(recorded.root, monkeypatch)
    assert not recorded.runs(**{"srlm.campaign": "late"})
    run(recorded.root, "iterations=1", name="late")
    assert [step for step, _ in recorded.points(recorded.parent("late"), "judgments/readable_rate")] == [1]
    assert {"late-M1", "late-M2"} <= recorded.models().keys()
    assert (folder / "mlflow.json").exists()


def run_without_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        return run(root, "iterations=1", name="late")


def test_a_new_folder_of_the_same_name_is_another_campaign(recorded: Recorded) -> None:
    small = ("iterations=0", 'evaluation.models="none"')
    for _ in range(2):
        shutil.rmtree(recorded.root / "again", ignore_errors=True)
        run(recorded.root, *small, name="again")
    assert len(recorded.runs(**{"srlm.campaign": "again", "srlm.role": "campaign"})) == 2


def test_the_tracking_server_is_the_setting_then_the_environment_then_beside_the_campaigns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = recipes.load("smoke")
    assert tracking_uri(config, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000")
    assert tracking_uri(config, tmp_path) == "http://team:5000"
    own = recipes.load("smoke", overrides=['tracking.mlflow_uri="http://mine:5000"'])
    assert tracking_uri(own, tmp_path) == "http://mine:5000"


def test_the_thread_behind_keeps_order_forgives_single_failures_and_ends_in_time(told: list[str]) -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("no such thing")

    behind = Background("watcher", "Nothing is lost.", away=lambda error: isinstance(error, OSError))
    for number in range(3):
        behind.put(done.append, number)
        behind.put(fail)
    behind.close(5)
    assert done == [0, 1, 2]
    assert told == ["watcher: ValueError: no such thing. Nothing is lost."]
    slow = Background("slow", "The rest is lost.", away=lambda error: False)
    slow.put(time.sleep, 3)
    began = time.monotonic()
    slow.close(0.1)
    assert time.monotonic() - began < 2
    assert told[1:] == ["slow did not finish within 0 s. The rest is lost."]


def test_the_thread_behind_catches_up_in_order_with_a_server_that_was_away(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.background.PAUSE_S", 0.01)
    tried: list[int] = []
    taken: list[int] = []

    def tell(number: int) -> None:
        tried.append(number)
        if len(tried) < 5:
            raise OSError("gone")
        taken.append(number)

    behind = Background("watcher", "Later.", away=lambda error: isinstance(error, OSError))
    for number in range(3):
        behind.put(tell, number)
    behind.close(5)
    assert tried == [0, 0, 0, 0, 0, 1, 2]
    assert taken == [0, 1, 2]
    assert not behind.failing
    assert told == ["watcher: OSError: gone. Later."]


def test_the_thread_behind_does_not_wait_for_ever(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.background.PAUSE_S", 0.01)
    tried: list[int] = []

    def tell(number: int) -> None:
        tried.append(number)
        raise OSError("gone")

    behind = Background("watcher", "Later.", away=lambda error: True)
    behind.put(tell, 0)
    began = time.monotonic()
    behind.close(0.2)
    assert time.monotonic() - began < 2
    assert behind.failing
    n = len(tried)
    time.sleep(0.1)
    assert n - 1 <= len(tried) <= n + 1  # nobody knocks after the end
    monkeypatch.setattr("tasks.background.PATIENCE_S", 0.0)
    tried.clear()
    once = Background("watcher", "Later.", away=lambda error: True)
    once.put(tell, 1)
    once.put(tell, 2)
    once.close(5)
    assert tried == [1, 2]


def test_points_that_were_lost_on_the_way_are_sent_again(recorded: Recorded) -> None:
    client, run = recorded.client, recorded.parent()
    told_twice = Unreliable(client)
    written = Written(told_twice, run.info.run_id, new=True)
    points = [Point("lost/once", float(step), step) for step in range(3)]
    with pytest.raises(OSError, match="away"):
        written.log(points)
    written.log(points)
    assert recorded.points(run, "lost/once") == [(0, 0.0), (1, 1.0), (2, 2.0)]


class Unreliable:
    """A client whose first batch is taken, but nobody hears of it."""

    def __init__(self, client: Any) -> None:
        self._client, self._away = client, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, *args: Any, **kwargs: Any) -> None:
        self._client.log_batch(*args, **kwargs)
        if self._away:
            self._away = False
            raise OSError("away")
