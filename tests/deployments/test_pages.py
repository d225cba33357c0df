"""What somebody sees and does in a browser: starts campaigns in Prefect's pages, compares them in MLflow's."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest
from team import Team

from flows import form

pytestmark = [pytest.mark.cluster, pytest.mark.prefect, pytest.mark.timeout(900)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("SRLM_SCREENSHOTS", "screenshots"))
"""CI keeps this folder."""
EVIL = (
    "![x](http://127.0.0.1:9/x.png) <img src=x onerror=\"document.title='owned'\">"
    "<script>document.title='owned'</script> Name {} fruits."
)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root Chromium has no sandbox; it only sees the servers of this test
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def shot(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.wait_for_timeout(1500)  # charts and tables draw themselves
    page.screenshot(path=str(SCREENSHOTS / f"{name}.png"))


def field(page: Any, name: str) -> Any:
    """The input of a form's field."""
    label = page.locator(".schema-form-property__label", has_text=re.compile(rf"^{re.escape(name)} \(Optional\)$"))
    return page.locator(".schema-form-property").filter(has=label).last.locator("input, textarea").first


def fill_in(team: Team, page: Any, name: str, **settings: Any) -> None:
    """Open the form of a campaign, and fill it in."""
    page.goto(f"{team.stack.at.prefect}/deployments")
    page.get_by_role("link", name="self-reward").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    field(page, "name").fill(name)
    labels = [
        label.removesuffix(" (Optional)") for label in page.locator(".schema-form-property__label").all_inner_texts()
    ]
    assert [label for label in labels if label in form.OFFERED] == list(form.OFFERED)
    for setting, value in settings.items():
        field(page, setting).fill(str(value))


def fill_in_and_run(team: Team, page: Any, name: str, **settings: Any) -> UUID:
    """Start a campaign as a person does; return its flow run, whose page is open then."""
    fill_in(team, page, name, **settings)
    shot(page, "prefect-form")
    with page.expect_response(re.compile(r"/create_flow_run$")) as made:
        page.get_by_role("button", name="Submit").click()
    run_id = UUID(made.value.json()["id"])
    page.locator(f"a[href*='/runs/flow-run/{run_id}']").first.click()
    page.wait_for_url(re.compile(f"/runs/flow-run/{run_id}"))
    assert team.run(run_id).parameters["name"] == name
    return run_id


def test_what_cannot_work_is_said_beside_its_field(team: Team, page: Any) -> None:
    fill_in(team, page, "refused", **{"responses.n": 1})
    page.get_by_role("button", name="Submit").click()
    told = page.locator(".schema-form-property", has_text="1 is less than the minimum of 2").last
    assert told.inner_text().startswith("responses.n")
    shot(page, "prefect-refused")
    assert "/deployments/deployment/" in page.url
    assert not (team.root / "refused").exists()


@pytest.fixture(scope="module")
def campaigns(team: Team, page: Any) -> dict[str, UUID]:
    """Two campaigns that were started from the form."""
    prompts = team.root / "evil.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": EVIL.format(n)}) for n in range(2, 14)))
    found = {}
    for name, n in (("four-responses", 4), ("six-responses", 6)):
        settings = {"responses.n": n, "prompts.target": 12, "prompts.file": prompts, "prompts.file_share": 0.9}
        found[name] = fill_in_and_run(team, page, name, **settings)
    for name, run_id in found.items():
        assert team.finished(run_id).state.is_completed(), (name, team.last_words())
    return found


def test_a_campaign_is_started_from_the_form_watched_and_looked_at(
    team: Team, page: Any, campaigns: dict[str, UUID]
) -> None:
    run_id = campaigns["four-responses"]
    assert team.run(run_id).parameters["settings"]["responses_n"] == 4
    page.goto(f"{team.stack.at.prefect}/runs/flow-run/{run_id}")
    page.get_by_text("Completed").first.wait_for()
    shot(page, "prefect-run")  # stages on a timeline
    page.get_by_text("Subflow Runs", exact=True).first.click()
    page.get_by_text("iteration 2").first.wait_for()
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("report", exact=True).first.wait_for()
    shot(page, "prefect-artifacts")
    page.get_by_text("Details", exact=True).first.click()
    page.get_by_text("M3 after 2 iterations").first.wait_for()
    iteration = child(team, run_id, "iteration 1")
    for key, seen in (("iteration-report", "judgments/readable_rate"), ("judge-health", "readable_rate")):
        open_artifact(team, page, iteration, key)
        page.get_by_text(seen).first.wait_for()
        shot(page, f"prefect-{key}")


def test_what_models_and_prompts_say_is_shown_and_not_obeyed(team: Team, page: Any, campaigns: dict[str, UUID]) -> None:
    open_artifact(team, page, child(team, campaigns["four-responses"], "iteration 1"), "pair-samples")
    page.get_by_text("onerror").first.wait_for()
    shot(page, "prefect-pair-samples")
    assert "<img src=x onerror=\"document.title='owned'\"><script>" in page.locator("table").inner_text()
    assert page.title() != "owned"
    assert page.locator("table img, table script").count() == 0
    report = team.root / "four-responses" / "report" / "index.html"
    page.goto(report.as_uri())
    page.get_by_text("onerror").first.wait_for(state="attached")
    assert page.title() != "owned"


def child(team: Team, run_id: UUID, name: str) -> UUID:
    from prefect.client.schemas import filters

    with team.client() as client:
        under = filters.FlowRunFilter(parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=[run_id]))
        (found,) = [run for run in client.read_flow_runs(flow_run_filter=under) if run.name == name]
    return found.id


def open_artifact(team: Team, page: Any, run_id: UUID, key: str) -> None:
    from prefect.client.schemas import filters

    with team.client() as client:
        of_run = filters.ArtifactFilter(flow_run_id=filters.ArtifactFilterFlowRunId(any_=[run_id]))
        (found,) = [one for one in client.read_artifacts(artifact_filter=of_run) if one.key == key]
    page.goto(f"{team.stack.at.prefect}/artifacts/artifact/{found.id}")


def test_two_campaigns_are_compared_in_a_chart(team: Team, page: Any, campaigns: dict[str, UUID]) -> None:
    from tasks.tracking import connect

    client = connect(team.stack.at.mlflow)
    experiment = client.get_experiment_by_name("srlm").experiment_id
    parents = {
        run.info.run_name: run.info.run_id
        for run in client.search_runs([experiment], "tags.`srlm.role` = 'campaign'")
        if run.info.run_name in campaigns
    }
    assert parents.keys() == campaigns.keys()
    only = quote("attributes.run_name LIKE '%-responses'")
    page.goto(f"{team.stack.at.mlflow}/#/experiments/{experiment}/runs?compareRunsMode=CHART&searchFilter={only}")
    page.get_by_placeholder("Search metric charts").wait_for()
    assistant = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if assistant.count():  # it opens by itself, and takes a third of the page
        assistant.first.click()
    page.get_by_placeholder("Search metric charts").fill("judgments/score_mean")
    plot = page.locator(".js-plotly-plot").first
    plot.wait_for()
    page.wait_for_timeout(3000)  # the search draws them anew
    shot(page, "mlflow-campaigns")
    lines = plot.evaluate("plot => plot.data.map(line => [line.name, line.x.length])")
    drawn = {name: points for name, points in lines if any(name.startswith(ours) for ours in campaigns)}
    assert len(drawn) == 2, lines
    assert set(drawn.values()) == {2}, lines  # a point for each iteration
