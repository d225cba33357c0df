"""The whole stack, as a team uses it: real servers, a real worker, flow runs that come from deployments."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from team import Team

from deployments.stack import WORKER

pytestmark = [pytest.mark.cluster, pytest.mark.prefect, pytest.mark.timeout(900)]

RESTART = Path(__file__).parents[2] / "deployments" / "automations" / "restart.yaml"
SIZE: dict[str, Any] = {"iterations": 4, "prompts_target": 16}
TINY = [
    {"setting": "seed_data.ift_rows", "value": "24"},
    {"setting": "seed_data.eft_groups", "value": "4"},
    {"setting": "evaluation.prompts", "value": "8"},
    {"setting": "evaluation.heldout_groups", "value": "6"},
]


def datasets(campaign: Path) -> dict[str, bytes]:
    found = sorted(campaign.rglob("*.parquet"))
    assert len(found) > 20
    return {str(path.relative_to(campaign)): path.read_bytes() for path in found}


# --- what the servers show --------------------------------------------------------------------------------------------


def shown_by_prefect(team: Team, run_id: UUID) -> tuple[Counter[Any], Counter[Any], Counter[Any]]:
    """Count a campaign's turns, their task runs with their states, and their artifacts."""
    from prefect.client.schemas import filters

    turns: Counter[Any] = Counter()
    tasks: Counter[Any] = Counter()
    artifacts: Counter[Any] = Counter()
    with team.client() as client:
        under = filters.FlowRunFilterParentFlowRunId(any_=[run_id])
        for turn in client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(parent_flow_run_id=under)):
            turns[turn.name, turn.state.name] += 1
            of_turn = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[turn.id]))
            tasks.update(
                (turn.name, task.name, task.state.name) for task in client.read_task_runs(flow_run_filter=of_turn)
            )
            made = filters.ArtifactFilter(flow_run_id=filters.ArtifactFilterFlowRunId(any_=[turn.id]))
            artifacts.update((turn.name, one.key) for one in client.read_artifacts(artifact_filter=made))
    return turns, tasks, artifacts


def shown_by_mlflow(team: Team, campaign: str) -> dict[str, Any]:
    """Return every run's name, status and points, and every model's status, of a campaign."""
    from tasks.tracking import connect

    client = connect(team.stack.at.mlflow)
    (experiment,) = [one for one in client.search_experiments() if one.name == "srlm"]
    runs = client.search_runs([experiment.experiment_id], f"tags.`srlm.campaign` = '{campaign}'", max_results=1000)
    parent = next(run for run in runs if run.data.tags["srlm.role"] == "campaign")
    ours = [run for run in runs if run.data.tags["srlm.id"] == parent.data.tags["srlm.id"]]
    points = {
        (run.info.run_name.replace(campaign, "NAME"), run.info.status, name): sorted(
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)
        )
        for run in ours
        for name in run.data.metrics
        if not any(word in name for word in ("so_far", "seconds", "per_second"))  # these are the clock's
    }
    models = client.search_logged_models([experiment.experiment_id], f"tags.`srlm.campaign` = '{campaign}'")
    statuses = sorted((model.name.replace(campaign, "NAME"), str(model.status)) for model in models)
    return {"points": points, "models": statuses}


def assert_recorded_alike(team: Team, name: str) -> None:
    """MLflow holds of a campaign what it holds of the undisturbed one, each point once."""
    ours, calms = shown_by_mlflow(team, name), shown_by_mlflow(team, "calm")
    assert ours["models"] == calms["models"]
    assert ours["points"].keys() == calms["points"].keys()
    assert {key: (points, calms["points"][key]) for key, points in ours["points"].items()
            if points != calms["points"][key]} == {}  # fmt: skip


@pytest.fixture(scope="module")
def calm(team: Team) -> tuple[UUID, Path]:
    """A campaign that nobody disturbed."""
    run = team.finished(team.start(recipe="smoke", name="calm", settings=SIZE))
    assert run.state.is_completed(), (run.state, team.last_words())
    return run.id, team.root / "calm"


def test_a_run_that_was_started_in_the_pages_completes_and_shows_itself(team: Team, calm: tuple[UUID, Path]) -> None:
    run_id, folder = calm
    assert team.run(run_id).state.message == "M5 after 4 iterations"
    assert (folder / "report" / "index.html").exists()
    turns, tasks, artifacts = shown_by_prefect(team, run_id)
    names = ["bootstrap", *(f"iteration {t}" for t in range(1, 5)), "evaluate"]
    assert turns == Counter({(name, "Completed"): 1 for name in names})
    assert {state for _, _, state in tasks} == {"Completed"}
    assert set(tasks.values()) == set(artifacts.values()) == {1}
    assert {("iteration 1", key) for key in ("iteration-report", "judge-health", "pair-samples")} <= set(artifacts)
    recorded = shown_by_mlflow(team, "calm")
    assert [step for step, _ in recorded["points"]["NAME", "FINISHED", "judgments/readable_rate"]] == [1, 2, 3, 4]
    assert {status for _, status in recorded["models"]} == {"READY"}


# --- what is away, or dies --------------------------------------------------------------------------------------------


_away_under: dict[str, int] = {}
"""By server, the worker that lived through its last outage."""


@contextmanager
def away(team: Team, name: str) -> Iterator[None]:
    """Stop a server, and start it again afterwards."""
    _away_under[name] = team.stack.pid(WORKER)
    database = team.stack.database if name == "postgres" else None
    database.stop() if database else team.stack.stop(name)
    try:
        yield
    finally:
        database.start() if database else team.stack.start(name)
        team.stack.await_servers()


@pytest.mark.parametrize(("server", "seconds"), [("mlflow", 60), ("postgres", 30), ("prefect", 60)])
def test_a_server_that_is_away_stops_nothing_and_is_told_everything_once(
    team: Team, calm: tuple[UUID, Path], server: str, seconds: int
) -> None:
    if server == "postgres" and team.stack.database is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    name = f"without-{server}"
    run_id = team.start(recipe="smoke", name=name, settings=SIZE)
    wait_for(team, run_id, team.root / name / "iter_02")
    with away(team, server):
        time.sleep(seconds)
    run = team.finished(run_id)
    assert run.state.is_completed(), (run.state, team.last_words())
    assert run.run_count == 1
    assert datasets(team.root / name) == datasets(calm[1])
    for ours, calms in zip(shown_by_prefect(team, run_id), shown_by_prefect(team, calm[0]), strict=True):
        assert {key: (ours[key], calms[key]) for key in ours | calms if ours[key] != calms[key]} == {}
    assert_recorded_alike(team, name)


def wait_for(team: Team, run_id: UUID, path: Path, timeout_s: float = 120.0) -> None:
    until = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < until, (team.run(run_id).state, team.last_words())
        time.sleep(0.1)


def of_campaign(name: str) -> list[int]:
    """List the processes that a worker started for a campaign, and what they started."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"/{name}/" in " ".join(process.cmdline()) or "PREFECT__FLOW_RUN_ID" in process.environ():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def nothing_is_left_of(name: str) -> None:
    gone = time.monotonic() + 30
    while of_campaign(name):
        assert time.monotonic() < gone, of_campaign(name)
        time.sleep(0.2)


@pytest.mark.parametrize("worker", ["deaf since the server was away", "that hears of it"])
def test_a_run_that_is_cancelled_in_the_pages_takes_its_engines_with_it(team: Team, worker: str) -> None:
    from engines.tiny import tiny_model
    from prefect.states import Cancelling

    model, name = team.root / "models" / "tiny", f"cancelled-{worker.partition(' ')[0]}"
    if not model.exists():
        tiny_model(model, seed=0)
    if "deaf" not in worker:
        team.stack.stop(WORKER)
        team.stack.start(WORKER)
    elif _away_under.get("prefect") != team.stack.pid(WORKER):
        with away(team, "prefect"):
            time.sleep(60)
    run_id = team.start(recipe="self_rewarding", size="small", name=name, settings={"model_path": str(model)})
    children = psutil.Process(team.stack.pid(WORKER)).children
    until = time.monotonic() + 120
    while not any("srlm_core.engines" in " ".join(one.cmdline()) for one in children(recursive=True)):
        assert time.monotonic() < until, team.last_words()
        time.sleep(0.2)
    with team.client() as client:
        client.set_flow_run_state(run_id, Cancelling())
    run = team.finished(run_id, 120)
    assert run.state.is_cancelled(), run.state
    nothing_is_left_of(name)
    turns, _, _ = shown_by_prefect(team, run_id)
    assert not {state for _, state in turns} & {"Running", "Pending"}


@contextmanager
def restarted_by_prefect(team: Team, *, lost_after_s: int) -> Iterator[None]:
    """Put the shipped automations in place, with a shorter patience."""
    shipped = RESTART.read_text()
    assert shipped.count("within: 600 ") == 1
    file = team.root / "restart.yaml"
    file.write_text(shipped.replace("within: 600 ", f"within: {lost_after_s} "))
    made = [sys.executable, "-m", "prefect", "automation", "create", "--from-file", str(file)]
    subprocess.run(made, env=os.environ | team.stack.environment, check=True, capture_output=True)
    try:
        yield
    finally:
        with team.client() as client:
            for automation in client.request("POST", "/automations/filter", json={}).json():
                client.request("DELETE", "/automations/{id}", path_params={"id": automation["id"]})


def assert_another_worker_ends_it(team: Team, run_id: UUID, name: str, calm: Path) -> None:
    """The same flow run goes on, to the same bytes, with nothing recorded twice."""
    team.stack.stop(WORKER)
    team.stack.start(WORKER)
    team.until(run_id, lambda state: state.is_completed())
    assert team.run(run_id).run_count == 2
    assert datasets(team.root / name) == datasets(calm)
    assert_recorded_alike(team, name)


def test_a_campaign_whose_worker_was_killed_goes_on_when_the_run_is_started_again(
    team: Team, calm: tuple[UUID, Path]
) -> None:
    from prefect.states import AwaitingRetry

    run_id = team.start(recipe="smoke", name="killed", settings=SIZE)
    wait_for(team, run_id, team.root / "killed" / "iter_02")
    assert of_campaign("killed")
    for process in psutil.Process(team.stack.pid(WORKER)).children(recursive=True):
        if "worker" in process.cmdline():
            os.kill(process.pid, signal.SIGKILL)
    team.until(run_id, lambda state: state.is_crashed(), 60)
    nothing_is_left_of("killed")
    with team.client() as client:  # the button "Retry"
        client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
    assert_another_worker_ends_it(team, run_id, "killed", calm[1])


def test_a_campaign_whose_machine_is_lost_goes_on_with_another_worker(team: Team, calm: tuple[UUID, Path]) -> None:
    """Nobody is left to say that the run crashed: its heartbeats stop, one of which comes every 30 s."""
    with restarted_by_prefect(team, lost_after_s=45):
        run_id = team.start(recipe="smoke", name="lost", settings=SIZE)
        wait_for(team, run_id, team.root / "lost" / "iter_02")
        machine = psutil.Process(team.stack.pid(WORKER)).children(recursive=True)
        for process in sorted(machine, key=lambda one: one.pid, reverse=True):
            process.kill()
        psutil.wait_procs(machine, timeout=30)
        assert team.run(run_id).state.is_running()
        assert_another_worker_ends_it(team, run_id, "lost", calm[1])


# --- schedules, limits, ten at once -----------------------------------------------------------------------------------


def test_a_schedule_fires_and_a_run_that_comes_too_soon_or_too_late_is_skipped(team: Team) -> None:
    from prefect.client.schemas import filters
    from prefect.client.schemas.schedules import IntervalSchedule
    from prefect.states import Scheduled

    with team.client() as client:
        nightly = client.read_deployment_by_name("nightly-rerun/nightly-rerun")
        (cron,) = nightly.schedules
        assert (cron.schedule.cron, cron.active) == ("0 2 * * *", False)
        client.update_deployment(
            nightly.id, _update(parameters={"recipe": "smoke", "overrides": TINY}, work_queue_name="default")
        )
        every = IntervalSchedule(interval=timedelta(seconds=8), anchor_date=datetime.now(UTC))
        (made,) = client.create_deployment_schedules(nightly.id, [(every, True)])
        of_it = filters.FlowRunFilter(deployment_id=filters.FlowRunFilterDeploymentId(any_=[nightly.id]))
        until = time.monotonic() + 240
        try:
            while True:
                states = Counter(run.state.name for run in client.read_flow_runs(flow_run_filter=of_it) if run.state)
                if states["Completed"] and states["Cancelled"]:
                    break
                assert time.monotonic() < until, (states, team.last_words())
                time.sleep(1)
        finally:
            client.delete_deployment_schedule(nightly.id, made.id)
            for run in client.read_flow_runs(flow_run_filter=of_it):
                if run.state.is_scheduled():
                    client.delete_flow_run(run.id)
        skipped = [run for run in client.read_flow_runs(flow_run_filter=of_it) if run.state.is_cancelled()]
        assert any("concurrency limit" in run.state.message for run in skipped), [run.state for run in skipped]
        while not all(run.state.is_final() for run in client.read_flow_runs(flow_run_filter=of_it)):
            assert time.monotonic() < until + 120
            time.sleep(1)
        message = "concurrency limit"  # its slot is free a moment after the last run's end
        while "concurrency limit" in message:
            assert time.monotonic() < until + 180
            due = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=2))
            state = team.finished(client.create_flow_run_from_deployment(nightly.id, state=due).id).state
            message = state.message
    assert (state.name, message) == ("Cancelled", "Skipped: due 120 minutes ago, latest_start_minutes=60.")
    (campaign,) = team.root.glob("smoke-2*")
    assert (campaign / "report" / "index.html").exists()


def _update(**changes: Any) -> Any:
    from prefect.client.schemas.actions import DeploymentUpdate

    return DeploymentUpdate(**changes)


def test_ten_campaigns_at_once_all_complete_and_none_mixes_with_another(team: Team) -> None:
    """Two of each seed: twins come out the same, others do not."""
    started = {
        f"twin-{seed}{which}": team.start(
            recipe="smoke", name=f"twin-{seed}{which}", settings={"seed": seed, "iterations": 1}, overrides=TINY
        )
        for seed in range(1, 6)
        for which in "ab"
    }
    states = {name: team.finished(run_id, 600).state for name, run_id in started.items()}
    assert all(state.is_completed() for state in states.values()), (states, team.last_words())
    made = {name: datasets(team.root / name) for name in started}
    for seed in range(1, 6):
        assert made[f"twin-{seed}a"] == made[f"twin-{seed}b"]
    assert len({made[f"twin-{seed}a"]["iter_01/pairs/part-00000.parquet"] for seed in range(1, 6)}) == 5
    for name, run_id in started.items():
        turns, tasks, _ = shown_by_prefect(team, run_id)
        assert {state for _, state in turns} == {"Completed"}, name
        assert set(tasks.values()) == {1}, name
        assert shown_by_mlflow(team, name) == shown_by_mlflow(team, f"{name[:-1]}a"), name
    assert "locked" not in team.last_words()


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_limit_that_is_missing_is_an_error_that_says_how_to_make_it(team: Team) -> None:
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    with team.client() as client:
        limit = client.read_global_concurrency_limit_by_name("cpu")
        client.delete_global_concurrency_limit_by_name("cpu")
        try:
            state = team.finished(team.start(recipe="smoke", name="unlimited")).state
        finally:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="cpu", limit=limit.limit))
    assert state.is_failed()
    assert "expected a global concurrency limit 'cpu'" in state.message
    assert "prefect gcl create cpu" in state.message
    assert not (team.root / "unlimited").exists()


def test_two_workers_that_are_given_one_campaign_do_not_share_it(team: Team, calm: tuple[UUID, Path]) -> None:
    runs = [team.start(recipe="smoke", name="wanted", settings=SIZE) for _ in range(2)]
    states = sorted((team.finished(run_id).state for run_id in runs), key=lambda state: state.name)
    assert [state.name for state in states] == ["Completed", "Failed"], (states, team.last_words())
    assert "another process" in states[1].message
    assert datasets(team.root / "wanted") == datasets(calm[1])


def test_a_run_that_no_worker_takes_is_called_late_and_waits_for_one(team: Team) -> None:
    team.stack.stop(WORKER)
    try:
        run_id = team.start(recipe="smoke", name="waited", settings={"iterations": 1}, overrides=TINY)
        late = team.until(run_id, lambda state: state.name == "Late", 90)
        assert late.run_count == 0
    finally:
        team.stack.start(WORKER)
    assert team.finished(run_id).state.is_completed()


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"settings": {"responses_n": 0}}, "responses_n"),
        ({"settings": {"prompts_file": "prompts.txt"}}, "prompts_file_share"),  # it goes with a share
        ({"settings": {"responses_n": 1}}, "responses_n"),  # within the field's bounds, but no pair comes of it
        ({"recipe": "dpo", "settings": {"iterations": 3}}, "iterations"),
        ({"name": "../out"}, "name"),
        ({"recipe": "gone"}, "recipe"),
        ({"overrides": [{"setting": "no.such", "value": "1"}]}, "overrides"),
    ],
)
def test_a_form_that_cannot_work_is_refused_before_there_is_a_run_with_its_field(
    team: Team, parameters: dict[str, Any], field: str
) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    with pytest.raises(PrefectHTTPStatusError) as refused:
        team.start(**parameters)
    assert refused.value.response.status_code in (409, 422)
    assert field in refused.value.response.text


def test_mlflow_that_is_away_at_the_start_is_said_so(team: Team) -> None:
    with away(team, "mlflow"):
        state = team.finished(team.start(recipe="smoke", name="unheard")).state
    assert state.is_failed()
    assert f"expected an MLflow server at {team.stack.at.mlflow}" in state.message
    assert not (team.root / "unheard" / "models").exists()
