"""The notifications that ship: Prefect takes them, and they speak up when they should."""

from pathlib import Path
from uuid import uuid4

import pytest
import yaml

FILE = Path(__file__).parents[2] / "deployments" / "automations" / "notify.yaml"
RESTART = FILE.with_name("restart.yaml")
STANDS_FOR = "00000000-0000-0000-0000-000000000000"


def shipped(file=FILE):
    from prefect.server.events.schemas.automations import AutomationCore

    found = yaml.safe_load(file.read_text())["automations"]
    return {one["name"]: AutomationCore.model_validate(one) for one in found}


def event(state, flow="self-reward", attempt=1):
    """What a flow run tells when it enters a state: see prefect.server.models.events."""
    from prefect.server.events.schemas.events import ReceivedEvent

    return ReceivedEvent(
        id=uuid4(), occurred="2026-01-01T00:00:00+00:00", event=f"prefect.flow-run.{state}",
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.resource.name": "demo",
                  "prefect.run-count": str(attempt)},
        related=[{"prefect.resource.id": f"prefect.flow.{uuid4()}", "prefect.resource.role": "flow",
                  "prefect.resource.name": flow}],
    )  # fmt: skip


def test_prefect_takes_all_of_them_and_every_message_renders():
    from prefect.events.schemas.automations import AutomationCore

    for one in yaml.safe_load(FILE.read_text())["automations"]:
        automation = AutomationCore.model_validate(one)  # as `prefect automation create --from-file` does
        assert [str(action.block_document_id) for action in automation.actions] == [STANDS_FOR]
    assert set(shipped()) == {
        "srlm-campaign-failed", "srlm-gate-failed", "srlm-campaign-completed", "srlm-run-late",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("state", "speaks"),
    [
        ("Failed", "srlm-campaign-failed"),
        ("Crashed", "srlm-campaign-failed"),
        ("Stopped by a gate", "srlm-gate-failed"),
        ("Completed", "srlm-campaign-completed"),
        ("Late", "srlm-run-late"),
        ("Running", None),
        ("Stopped by a person", None),
        ("Cancelled", None),
    ],
)
def test_each_end_is_told_by_one_of_them_and_no_iteration_is(state, speaks):
    told = [
        name
        for name, automation in shipped().items()
        if automation.trigger.covers(event(state)) and automation.trigger.expects(event(state).event)
    ]
    assert told == ([speaks] if speaks else [])
    told = [name for name, automation in shipped().items() if automation.trigger.covers(event(state, "iteration"))]
    assert set(told) <= {"srlm-run-late"}  # of whatever flow: an iteration is never late


@pytest.mark.parametrize(
    ("state", "flow", "attempt", "again"),
    [
        ("Crashed", "self-reward", 1, True),
        ("Crashed", "nightly-rerun", 3, True),
        ("Crashed", "self-reward", 4, False),
        ("Crashed", "iteration", 1, False),
        ("Failed", "self-reward", 1, False),
        ("Stopped by a gate", "self-reward", 1, False),
        ("Cancelled", "self-reward", 1, False),
    ],
)
def test_only_a_campaign_that_crashed_is_started_again_and_not_for_ever(state, flow, attempt, again):
    trigger = shipped(RESTART)["srlm-campaign-again"].trigger
    told = event(state, flow, attempt)
    assert (trigger.covers(told) and trigger.expects(told.event)) == again


def test_a_campaign_is_lost_only_after_no_sign_for_longer_than_a_server_is_away():
    trigger = shipped(RESTART)["srlm-campaign-lost"].trigger
    assert trigger.within.total_seconds() == 600
    assert trigger.after == {"prefect.flow-run.heartbeat"}
    ends = {"Completed", "Failed", "Cancelled", "Crashed", "Stopped by a gate", "Stopped by a person"}
    assert {f"prefect.flow-run.{end}" for end in ends} <= trigger.expect


def test_the_file_says_what_it_needs_and_holds_no_address():
    text = FILE.read_text()
    assert "prefect block create" in text
    assert "prefect automation create --from-file" in text
    assert "hooks.slack.com" not in text


@pytest.mark.cluster
@pytest.mark.prefect
def test_a_server_takes_them_from_the_file(tmp_path):
    import asyncio

    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.cli.automation import create
    from prefect.client.orchestration import get_client
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        block = CustomWebhookNotificationBlock(
            name="alerts", url="http://127.0.0.1:9/told", json_data={"text": "{{body}}"}
        )
        saved = block.save("srlm-alerts")
        mine = tmp_path / "notify.yaml"
        mine.write_text(FILE.read_text().replace(STANDS_FOR, str(saved)))
        with pytest.raises(SystemExit) as done:
            asyncio.run(create(from_file=str(mine)))
        assert done.value.code == 0

        async def there():
            async with get_client() as client:
                return {one.name for one in await client.read_automations()}

        assert set(shipped()) <= asyncio.run(there())
