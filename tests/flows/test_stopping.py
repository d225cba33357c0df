"""Ends on purpose, as Prefect shows them: a gate, a decision in the UI or elsewhere, a cancelled wait."""

import json
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flow_runs import client, flow_run, turns

from flows import slots
from flows.server import PrefectServer
from srlm_core import approval, recipes, store
from srlm_core.errors import CancelledByPerson, StoppedByGate, StoppedByPerson

pytestmark = [pytest.mark.prefect, pytest.mark.cluster]

NOT_MEASURED = ('evaluation.models="none"',)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.asking.LOOK_S", 0.2)


def test_a_gate_ends_the_run_in_a_state_of_its_own_and_the_same_command_goes_on(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path
) -> None:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with pytest.raises(StoppedByGate, match="readable_rate"):
        campaign(tmp_path, *NOT_MEASURED, "gates.min_readable_rate=1", name="gated")
    run = flow_run("gated")
    (iteration,) = [turn for turn in turns(run) if turn.name == "iteration 1"]
    for stopped in (run, iteration):
        assert (stopped.state.type.value, stopped.state.name) == ("FAILED", "Stopped by a gate")
        assert "M1 was expected to pass its gates" in stopped.state.message
        assert "gates.min_readable_rate" in stopped.state.message
    with client() as here:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[iteration.id]))
        (table,) = [one for one in here.read_artifacts(artifact_filter=wanted) if one.key == "gates"]
    (row,) = json.loads(table.data)
    assert (row["model"], row["name"], row["limit"], row["passed"]) == ("M1", "readable_rate", 1.0, "failed")
    assert (tmp_path / "gated" / "report" / "index.html").exists()
    campaign(tmp_path, *NOT_MEASURED, "gates.min_readable_rate=0.1", name="gated", observers=[_renamed(run)])
    again = flow_run("gated")
    assert again.state.is_completed()
    assert again.state.message == "M2 after 1 iteration; 1 of 1 gates passed"


def _renamed(run: Any) -> Callable[..., None]:
    """Give an earlier run another name, so that the next one is found by its own."""
    with client() as here:
        here.update_flow_run(run.id, name=f"{run.name}, earlier")
    return lambda what, details: None


class Background:
    """A campaign that runs beside the test, and what it ended with."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.raised: BaseException | None = None
        self._run = run
        self._thread = threading.Thread(target=partial(copy_context().run, self._try), daemon=True)
        self._thread.start()

    def _try(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.raised = error

    def end(self) -> BaseException | None:
        self._thread.join(90)
        assert not self._thread.is_alive()
        return self.raised


@pytest.fixture
def waiting(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path
) -> Callable[[str], tuple[Background, Any]]:
    """Start a campaign of two iterations that asks between them, and wait until it does."""

    def start(name: str) -> tuple[Background, Any]:
        asks = (*NOT_MEASURED, "iterations=2", "gates.approval=true")
        behind = Background(partial(campaign, tmp_path, *asks, name=name))
        return behind, _in_state(name, "Paused")

    return start


def _in_state(name: str, state: str, timeout_s: float = 60.0) -> Any:
    until = time.monotonic() + timeout_s
    while True:
        try:
            run = flow_run(name)
            if run.state.name == state:
                return run
        except ValueError:
            pass  # it is not there yet
        assert time.monotonic() < until, f"{name} is not {state}"
        time.sleep(0.3)


def test_a_paused_run_is_resumed_from_the_ui_and_goes_on(
    waiting: Callable[[str], tuple[Background, Any]], tmp_path: Path
) -> None:
    behind, run = waiting("asked")
    assert "iteration 1 is finished, M2 is trained. Go on to iteration 2?" in run.state.message
    keys = run.state.state_details.run_input_keyset
    with client() as here:
        form = json.loads(here.read_flow_run_input(run.id, keys["schema"]))
        assert form["properties"]["decision"]["enum"] == ["go on", "stop"]
        assert form["required"] == ["decision"]
        assert "M2 is trained" in here.read_flow_run_input(run.id, keys["description"])
        assert (tmp_path / "asked" / "report" / "index.html").exists()
        for wrong in ({}, {"decision": "perhaps"}):
            assert here.resume_flow_run(run.id, wrong).status.value == "REJECT"
        assert here.resume_flow_run(run.id, {"decision": "go on"}).status.value == "ACCEPT"
    assert behind.end() is None
    assert store.read_json(tmp_path / "asked" / "iter_01" / "approval.json")["go_on"] is True
    assert (tmp_path / "asked" / "models" / "M3" / "complete.json").exists()
    assert flow_run("asked").state.message == "M3 after 2 iterations"


def test_a_run_that_somebody_stops_is_no_crash(
    waiting: Callable[[str], tuple[Background, Any]], tmp_path: Path
) -> None:
    behind, run = waiting("refused")
    with client() as here:
        here.resume_flow_run(run.id, {"decision": "stop"})
    assert isinstance(behind.end(), StoppedByPerson)
    assert flow_run("refused").state.name == "Stopped by a person"
    assert not (tmp_path / "refused" / "models" / "M3").exists()


def test_a_decision_on_the_command_line_resumes_a_paused_run(
    waiting: Callable[[str], tuple[Background, Any]], tmp_path: Path
) -> None:
    behind, _ = waiting("elsewhere")
    assert approval.decide(tmp_path / "elsewhere", go_on=True) == 1
    assert behind.end() is None
    assert flow_run("elsewhere").state.is_completed()


def test_a_cancelled_wait_ends_and_the_campaign_can_still_go_on(
    waiting: Callable[[str], tuple[Background, Any]], campaign: Callable[..., Path], tmp_path: Path
) -> None:
    from prefect.states import Cancelling

    behind, run = waiting("cancelled")
    with client() as here:
        here.set_flow_run_state(run.id, Cancelling(), force=True)  # what the button of the UI sends
    assert isinstance(behind.end(), CancelledByPerson)
    assert flow_run("cancelled").state.is_cancelled()
    _renamed(run)
    approval.decide(tmp_path / "cancelled", go_on=True)
    campaign(tmp_path, *NOT_MEASURED, "iterations=2", "gates.approval=true", name="cancelled")
    assert flow_run("cancelled").state.message == "M3 after 2 iterations"


def test_whoever_waits_for_a_person_holds_no_slot(
    server: PrefectServer, campaign: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    def active() -> int:
        with client() as here:
            return here.read_global_concurrency_limit_by_name("one").active_slots

    def run() -> None:
        with slots.held(config):
            campaign(tmp_path, *asks, name="slots")

    monkeypatch.setenv("SRLM_SLOTS", "one")
    with client() as here:
        here.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="one", limit=1))
    asks = (*NOT_MEASURED, "iterations=2", "gates.approval=true")
    config = recipes.load("smoke", overrides=asks)
    behind = Background(run)
    _in_state("slots", "Paused")
    assert active() == 0
    with slots.held(config):  # somebody else's campaign
        approval.decide(tmp_path / "slots", go_on=True)
        _in_state("slots", "Running")
        time.sleep(1)
        assert not (tmp_path / "slots" / "iter_02").exists()  # it waits for its slot again
    assert behind.end() is None
    assert flow_run("slots").state.is_completed()
    assert active() == 0
