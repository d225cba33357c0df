"""Task runs that the server missed: they reach it as events, and events that come while its database is away are lost.

So at a campaign's end what the server shows is held against what was run, and the difference is told it again.
"""

import logging
import time
from threading import Lock
from typing import Any, NamedTuple
from uuid import UUID

import httpx
from prefect import Task, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun

log = logging.getLogger("srlm")

PATIENCE_S = 10.0
"""Longest wait for events that are still on their way."""
LOOK_S = 0.5
PAGE = 200
"""As many task runs as the server shows at once."""


class Ran(NamedTuple):
    """A task run that has ended, as we know it."""

    task: Task[..., Any]
    name: str
    flow_run_id: UUID
    state: State[Any]
    """Without what it came to."""


class TaskRuns:
    """The task runs of a campaign."""

    def __init__(self) -> None:
        self._ran: dict[UUID, Ran] = {}
        self._lock = Lock()

    def note(self, task: Task[..., Any], name: str, flow_run_id: UUID | None, state: State[Any] | None) -> None:
        """Note one that has ended."""
        known = state.state_details.task_run_id if state and state.is_final() else None
        if state is not None and known is not None and flow_run_id is not None:
            with self._lock:
                self._ran[known] = Ran(task, name, flow_run_id, state.model_copy(update={"data": None}))

    def settle(self) -> int:
        """Tell the server of those it does not show as they ended; return how many. One that is away stays in debt."""
        try:
            with get_client(sync_client=True) as client:
                there = self._settled(client)
                missed = [run_id for run_id in self._ran if not there.get(run_id)]
                for run_id in missed:
                    self._tell(client, run_id, known=run_id in there)
        except httpx.HTTPError as error:
            log.warning("Prefect may miss task runs of this campaign: %s. The campaign itself misses nothing.", error)
            return 0
        if missed:
            log.info("%d task runs were told to Prefect again", len(missed))
        return len(missed)

    def _settled(self, client: SyncPrefectClient) -> dict[UUID, bool]:
        """Return what the server shows, and whether as ended and by its name, once no more events come."""
        until, before = time.monotonic() + PATIENCE_S, -1
        while True:
            there = self._there(client)
            ended = sum(there.values())
            if ended >= len(self._ran) or ended == before or time.monotonic() > until:
                return there
            time.sleep(LOOK_S if before < 0 else 4 * LOOK_S)
            before = ended

    def _there(self, client: SyncPrefectClient) -> dict[UUID, bool]:
        flow_runs = {ran.flow_run_id for ran in self._ran.values()}
        ours, found = FlowRunFilter(id=FlowRunFilterId(any_=list(flow_runs))), dict[UUID, bool]()
        while True:
            page = client.read_task_runs(flow_run_filter=ours, limit=PAGE, offset=len(found))
            found |= {run.id: self._as_it_ran(run) for run in page if run.id not in found}
            if len(page) < PAGE:
                return {run_id: told for run_id, told in found.items() if run_id in self._ran}

    def _as_it_ran(self, run: TaskRun) -> bool:
        ours = self._ran.get(run.id)
        # its name comes with the second event: one whose others were lost would stay "responses-5f3"
        return ours is not None and run.name == ours.name and run.state is not None and run.state.is_final()

    def _tell(self, client: SyncPrefectClient, run_id: UUID, *, known: bool) -> None:
        task, name, flow_run_id, state = self._ran[run_id]
        if known:
            client.set_task_run_name(run_id, name)
        else:
            client.create_task_run(task, flow_run_id, str(run_id), id=run_id, name=name)
        client.set_task_run_state(run_id, state, force=True)
