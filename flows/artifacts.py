"""What Prefect shows of a campaign besides its runs: progress, reports, judge health, sample pairs, links."""

import json
import math
from collections.abc import Callable
from threading import Lock
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext

from srlm_core import gates, summary, table
from srlm_core.spelling import escape_markdown
from srlm_core.store import Campaign
from tasks.background import AtMost, Background

CLOSE_S = 30.0
MOVES_S = 1.0
"""Seconds between two moves of a progress bar."""


class Artifacts:
    """An observer of the loop, inside a flow run.

    Prefect's own helpers are not used: they speak through the client of the run they are called in, which is gone
    by the time that a thread behind the loop comes to it.
    """

    def __init__(self, campaign: Campaign, tracked_at: Callable[[], str | None]) -> None:
        self._campaign, self._tracked_at = campaign, tracked_at
        self._behind = Background("Prefect artifacts", "The campaign goes on; they follow once it is back.", _away)
        self._client: SyncPrefectClient | None = None
        self._bars: dict[str, Bar] = {}

    def __call__(self, what: str, details: dict[str, Any]) -> None:
        """Take one event of the loop."""
        told, context = getattr(self, f"_on_{what}", None), FlowRunContext.get()
        if told and context and context.flow_run:
            told(Publisher(self._connection, context.flow_run.id), **details)

    def _connection(self) -> SyncPrefectClient:
        """Return one client for all artifacts; it is made, and used, in the thread behind the loop."""
        if self._client is None:
            self._client = get_client(sync_client=True).__enter__()
        return self._client

    def close(self) -> None:
        """Wait for what is still on its way."""
        self._behind.put(self._hang_up)
        self._behind.close(CLOSE_S)

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.__exit__(None, None, None)

    def _on_shards(self, publish: "Publisher", stage: str, iteration: int, total: int) -> None:
        key = f"progress-{iteration}-{stage}".replace("_", "-")
        bar = Bar(publish, key, f"{stage} of iteration {iteration}", total)
        self._bars[f"{stage} {iteration}"] = bar
        self._behind.put(bar.show)

    def _on_part(self, publish: "Publisher", stage: str, iteration: int, **_: Any) -> None:
        bar = self._bars.get(f"{stage} {iteration}")
        if bar is not None and bar.moved():
            self._behind.put(bar.show)

    def _on_training(self, publish: "Publisher", model: str, progress: dict[str, Any]) -> None:
        if progress.get("event") != "step":
            return
        key = f"progress-training-{model}".lower().replace("_", "-")
        fresh = Bar(publish, key, f"training of {model}", progress["total_steps"])
        bar = self._bars.setdefault(f"training {model}", fresh)
        if bar.moved(progress["step"]):
            self._behind.put(bar.show)

    def _on_iteration(self, publish: "Publisher", t: int) -> None:
        for make in (iteration_report, judge_health, pair_samples):
            self._behind.put(make, publish, self._campaign, t)

    def _on_gate(self, publish: "Publisher", **_: Any) -> None:
        self._behind.put(gates_table, publish, self._campaign)

    def _on_finished(self, publish: "Publisher", **_: Any) -> None:
        self._behind.put(self._links, publish)

    def _links(self, publish: "Publisher") -> None:
        page = self._campaign.report / "index.html"
        if page.exists():
            publish("markdown", "report", f"[Report]({page.resolve().as_uri()})", f"The campaign's report: {page}")
        where = self._tracked_at()
        if where:
            text = f"[MLflow run]({where})" if where.startswith("http") else f"    {where}"
            publish("markdown", "mlflow-run", text, "Curves, metrics and models of the campaign")


def _away(error: Exception) -> bool:
    """Say whether the server may take later what it does not take now."""
    code = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
    return code >= 500 if code is not None else isinstance(error, httpx.HTTPError)


class Publisher:
    """Makes artifacts of one flow run."""

    def __init__(self, connection: Callable[[], SyncPrefectClient], flow_run: UUID) -> None:
        self._connection, self._flow_run = connection, flow_run

    def __call__(self, kind: str, key: str, data: str | float, description: str) -> UUID:
        """Make one: markdown, table (JSON) or progress (percent)."""
        artifact = ArtifactCreate(type=kind, key=key, data=data, description=description, flow_run_id=self._flow_run)
        return self._connection().create_artifact(artifact).id

    def move(self, artifact: UUID, data: float) -> None:
        """Move a progress bar."""
        self._connection().update_artifact(artifact, ArtifactUpdate(data=data))


class Bar:
    """A progress artifact: one per stage and iteration."""

    def __init__(self, publish: Publisher, key: str, description: str, total: int) -> None:
        self._publish = publish
        self.done, self._total = 0, total
        self._key, self._description = key, description
        self._id: UUID | None = None
        self._moves = AtMost(MOVES_S)
        self._lock = Lock()

    def moved(self, to: int | None = None) -> bool:
        """Note where it is, one further unless told; True where that is to be shown now."""
        with self._lock:
            self.done = self.done + 1 if to is None else to
            return self.done >= self._total or self._moves.now()

    def show(self) -> None:
        """Make the artifact, or move it."""
        percent = 100.0 * self.done / self._total if self._total else 100.0
        if self._id is None:
            self._id = self._publish("progress", self._key, percent, self._description)
        else:
            self._publish.move(self._id, percent)


def iteration_report(publish: Publisher, campaign: Campaign, t: int) -> None:
    """Show the numbers of iteration t and the models so far, as Markdown."""
    measured = summary.iteration_metrics(campaign.folder, t)
    lines = [f"| {name} | {value:.4g} |" for name, value in sorted(measured.items())]
    measures = "\n".join(["| measure | value |", "|---|---:|", *lines])
    models = table.as_markdown(table.of_campaign(campaign.folder))
    made = f"## What M{t} made, and what M{t + 1} was trained on"
    text = f"# {campaign.name}: iteration {t}\n\n{models}\n\n{made}\n\n{measures}\n"
    publish("markdown", "iteration-report", text, f"Iteration {t} of {campaign.name}")


def judge_health(publish: Publisher, campaign: Campaign, t: int) -> None:
    """Show how the judge did in each iteration so far."""
    rows: list[dict[str, float | None]] = []
    for s in range(1, t + 1):
        measured = summary.iteration_metrics(campaign.folder, s).items()
        health = {name.partition("/")[2]: _short(value) for name, value in measured if name.startswith("judgments/")}
        rows.append({"iteration": s} | health)
    publish("table", "judge-health", json.dumps(rows), f"{campaign.name}: readable, spread, swayed by length")


def pair_samples(publish: Publisher, campaign: Campaign, t: int) -> None:
    """Show the first pairs that M_{t+1} was trained on."""
    rows = [
        # the page draws a table's cells as Markdown, with HTML and images
        {name: escape_markdown(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in summary.sample_pairs(campaign.folder, t)
    ]
    publish("table", "pair-samples", json.dumps(rows), f"{campaign.name}: what M{t + 1} was taught to prefer")


def gates_table(publish: Publisher, campaign: Campaign) -> None:
    """Show what every M_t so far came to at its gates."""
    rows = [
        {"model": f"M{t}", **gate._asdict(), "passed": _WORDS[gate.passed]}
        for t, asked in gates.read(campaign.folder).items()
        for gate in asked
    ]
    publish("table", "gates", json.dumps(rows), f"{campaign.name}: what its models must keep to")


_WORDS = {True: "passed", False: "failed", None: "not measured"}


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)
