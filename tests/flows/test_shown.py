"""A campaign through Prefect: the same files, and all of it on show."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from flow_runs import client, flow_run, turns

from flows.missed import TaskRuns
from flows.server import PrefectServer
from srlm_core.backend import Backend, Model
from srlm_core.engines.protocol import Completion, Engine
from srlm_core.errors import EngineDied, ModelError, NothingLeft

pytestmark = pytest.mark.prefect

EVALUATED = ("responses", "heldout", "text", "attacks")


def rows_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def task_runs(runs: list[Any], expected: int) -> list[Any]:
    """The task runs of these flow runs; the server learns of them a moment later."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in runs]))
    until = time.monotonic() + 15
    while True:
        with client() as here:
            found = here.read_task_runs(flow_run_filter=wanted, limit=200)
        settled = len(found) >= expected and all(run.state and run.state.is_final() for run in found)
        if settled or time.monotonic() > until:
            return found
        time.sleep(0.2)


@pytest.fixture(scope="module")
def shown(server: PrefectServer, campaign: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that Prefect has shown."""
    return campaign(tmp_path_factory.mktemp("shown"), name="shown")


def test_the_datasets_are_the_same_bytes_as_without_prefect(
    shown: Path, campaign: Callable[..., Path], tmp_path: Path
) -> None:
    plain = rows_of(campaign(tmp_path, name="shown", prefect=False))
    assert len(plain) > 20
    assert rows_of(shown) == plain


def test_the_campaign_is_a_flow_run_of_its_name_with_a_sub_flow_for_each_turn(shown: Path) -> None:
    run = flow_run("shown")
    assert run.state.is_completed()
    assert run.parameters["name"] == "shown"
    assert run.parameters["size"] == "smoke"
    assert {"setting": "prompts.target", "value": "8"} in run.parameters["overrides"]
    assert sorted(turn.name for turn in turns(run)) == ["bootstrap", "evaluate", "iteration 1"]


def test_every_shard_is_a_task_run_that_says_which(shown: Path) -> None:
    shards = [f"{stage} 1.{n}/2" for stage in ("prompts", "responses", "judgments", "pairs") for n in (1, 2)]
    trained = [f"training {model}" for model in ("sft_baseline", "M1", "M2")]
    evaluated = [f"{what} of {model}" for model in ("M0", "sft_baseline", "M1", "M2") for what in EVALUATED]
    expected = {*shards, *trained, *evaluated, "M2 vs M1", "M2 vs sft baseline", "M1 vs sft baseline"}
    found = task_runs(turns(flow_run("shown")), len(expected))
    assert expected <= {run.name for run in found}
    assert all(run.state.is_completed() for run in found)


def test_artifacts_show_progress_the_report_judge_health_and_sample_pairs(shown: Path) -> None:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    runs = {run.id: run.name for run in [flow_run("shown"), *turns(flow_run("shown"))]}
    with client() as here:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=list(runs)))
        found = {artifact.key: artifact for artifact in here.read_artifacts(artifact_filter=wanted)}
    made_in = {key: runs[artifact.flow_run_id] for key, artifact in found.items()}
    assert made_in["iteration-report"] == made_in["judge-health"] == made_in["pair-samples"] == "iteration 1"
    assert made_in["report"] == "shown"
    bars = {key: artifact.data for key, artifact in found.items() if key.startswith("progress-")}
    assert bars.keys() >= {f"progress-1-{stage}" for stage in ("prompts", "responses", "judgments", "pairs")}
    assert all(float(data) == 100 for data in bars.values())
    assert "judgments/readable_rate" in found["iteration-report"].data
    assert json.loads(found["pair-samples"].data)[0]["chosen"]
    assert json.loads(found["judge-health"].data)[0]["iteration"] == 1


def test_what_goes_wrong_is_raised_as_it_is_and_told_by_the_flow_run(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(NothingLeft, match="expected pairs to train M2"):
        campaign(tmp_path, "pairs.min_margin=5", name="nothing-left")
    run = flow_run("nothing-left")
    assert run.state.is_failed()
    assert "expected pairs to train M2" in run.state.message


def test_an_error_inside_a_shard_is_raised_as_it_is_and_not_tried_again(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path
) -> None:
    asked = []

    def broken(backend: Backend) -> Backend:
        def open_model(model: Model) -> Engine:
            asked.append(model.name)
            raise ModelError("the model is gone")

        return backend._replace(open=open_model)

    with pytest.raises(ModelError, match="the model is gone"):
        campaign(tmp_path, 'evaluation.models="none"', name="gone", change=broken)
    assert asked == ["M1"]
    assert "the model is gone" in flow_run("gone").state.message


class Mortal:
    """A scripted engine that dies once, on its first request."""

    def __init__(self, engine: Any, deaths: list[str], name: str) -> None:
        self._engine, self._deaths, self._name = engine, deaths, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __enter__(self) -> "Mortal":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def generate(self, requests: Any) -> Iterator[Completion]:
        if self._name == "M1" and not self._deaths:
            self._deaths.append(self._name)
            raise EngineDied("killed")
        return self._engine.generate(requests)


def test_a_shard_whose_engine_died_is_tried_again(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path
) -> None:
    deaths: list[str] = []

    def mortal(backend: Backend) -> Backend:
        return backend._replace(open=lambda model: Mortal(backend.open(model), deaths, model.name))  # type: ignore[arg-type, return-value]

    folder = campaign(tmp_path, 'evaluation.models="none"', name="mortal", change=mortal)
    assert deaths == ["M1"]
    assert (folder / "models" / "M2" / "complete.json").exists()
    again = [run for run in task_runs(turns(flow_run("mortal")), 10) if run.run_count == 2]
    assert [run.name for run in again] == ["prompts 1.1/2"]


def test_a_deployed_flow_puts_its_campaign_together_and_is_one_flow_run(
    server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from flows.form import Changed, Override
    from flows.self_reward import self_reward

    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setenv("SRLM_ROOT", str(tmp_path))
    small = Changed(prompts_target=4, iterations=1, evaluation_models="none")  # type: ignore[call-arg]
    self_reward(
        "smoke", name="deployed", settings=small, overrides=[Override(setting="seed_data.eft_groups", value="4")]
    )
    config = json.loads((tmp_path / "deployed" / "config.json").read_text())
    assert (config["prompts"]["target"], config["seed_data"]["eft_groups"], config["responses"]["n"]) == (4, 4, 4)
    assert (tmp_path / "deployed" / "report" / "index.html").exists()
    assert sorted(turn.name for turn in turns(flow_run("deployed"))) == ["bootstrap", "evaluate", "iteration 1"]


def test_wrong_parameters_are_refused_before_the_run(server: PrefectServer) -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.self_reward import self_reward

    wrong: Any = [
        ({"recipe": "self_rewardin"}, "recipe: expected one of smoke, demo"),
        ({"name": "../elsewhere"}, "name"),
        ({"settings": {"responses_n": 0}}, "greater than or equal to 1"),
        ({"settings": {"responses_m": 1}}, "responses_m"),
        ({"overrides": [{"setting": "responses.m", "value": "1"}]}, "overrides.0.setting"),
    ]
    for parameters, told in wrong:
        with pytest.raises(ParameterTypeError, match=told):
            self_reward(**parameters)


def test_two_campaigns_stand_side_by_side(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.compare import compare

    shutil.copytree(shown, shown.parent / "again", ignore=shutil.ignore_patterns("*.lock"))
    monkeypatch.setenv("SRLM_ROOT", str(shown.parent))
    rows = compare(["shown", "again"])
    assert [row["method"] for row in rows] == ["shown", "again"]


def test_a_comparison_runs_its_methods_as_sub_flows_and_shows_the_table(
    server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    from flows.compare import compare
    from flows.form import Changed, OverrideOf

    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setenv("SRLM_ROOT", str(tmp_path))
    small = Changed(prompts_target=4, iterations=1, evaluation_models="none")  # type: ignore[call-arg]
    rows = compare.with_options(flow_run_name="compared")(
        ["spin", "dpo"], "smoke", settings=small,
        overrides=[OverrideOf(recipe="spin", setting="seed_data.ift_rows", value="8")],
    )  # fmt: skip
    assert [(row["method"], row["points"]["value"]) for row in rows] == [("spin", None), ("dpo", None)]
    run = flow_run("compared")
    assert sorted(turn.name for turn in turns(run)) == ["compare-smoke-dpo-s0", "compare-smoke-spin-s0"]
    assert sorted(turn.name for turn in turns(flow_run("compare-smoke-dpo-s0"))) == [
        "bootstrap", "evaluate", "iteration 1",
    ]  # fmt: skip
    with client() as here:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        assert {one.key for one in here.read_artifacts(artifact_filter=wanted)} == {"comparison", "comparison-report"}


def test_task_runs_that_the_server_lost_are_told_again(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas import filters
    from prefect.events.worker import EventsWorker

    send, lost = EventsWorker.send, Counter[str]()

    def forgetful(self: EventsWorker, event: Any) -> None:
        """Lose all that is said of every fifth task run, the end of the next, all but the start of the one after."""
        kind, _, of = event.event, *event.resource["prefect.resource.id"].rpartition(".")[1:]
        losing: tuple[str, ...] = ()
        if kind.startswith("prefect.task-run."):
            losing = {0: ("",), 1: ("Completed",), 2: ("Running", "Completed")}.get(int(UUID(of)) % 5, ())
        if kind.endswith(losing):
            lost[kind.rpartition(".")[2]] += 1
        else:
            send(self, event)

    monkeypatch.setattr(EventsWorker, "send", forgetful)
    ran, note = [], TaskRuns.note

    def counted(self: TaskRuns, task: Any, name: str, *rest: Any) -> None:
        ran.append(name)
        note(self, task, name, *rest)

    monkeypatch.setattr(TaskRuns, "note", counted)
    campaign(tmp_path, name="lossy")
    assert lost["Completed"] > lost["Running"] > lost["Pending"] > 0, lost
    shown: list[str] = []
    for turn in turns(flow_run("lossy")):
        ours = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[turn.id]))
        with client() as here:
            found = [(one.name, one.state.name) for one in here.read_task_runs(flow_run_filter=ours)]
        assert {state for _, state in found} <= {"Completed"}, turn.name
        shown += [name for name, _ in found]
    assert sorted(shown) == sorted(ran)
