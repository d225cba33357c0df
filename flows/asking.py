"""A flow run that waits for a person: paused with a form of two choices, resumed or cancelled from the UI.

`prefect.pause_flow_run` does the same, but goes on waiting when the run is cancelled, gives up after a time, and fails
when the server is away for a moment.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, cast
from uuid import UUID, uuid4

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.input import RunInput, keyset_from_paused_state
from prefect.states import Paused

from flows import slots
from srlm_core import interrupts
from srlm_core.errors import CancelledByPerson, Stopped, WaitsForPerson

LOOK_S = 2.0
"""Seconds between two looks at what somebody decided."""


class Decision(RunInput):
    """The form."""

    decision: Literal["go on", "stop"]


def ask(question: str, decided: Callable[[], bool | None]) -> bool | None:
    """Pause the flow run that is under way until it is resumed with a decision, or one is made elsewhere.

    The campaign's slots are others' meanwhile: a person may take days. None outside a flow run. Raises
    CancelledByPerson when the run is cancelled, WaitsForPerson when it ends otherwise.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return decided()
    with slots.lent(), get_client(sync_client=True) as client:
        pause = Pause(client, context.flow_run.id, question)
        while True:
            interrupts.check()
            with suppress(httpx.HTTPError):  # the server is away: a decision can wait for it
                answer = pause.look(decided())
                if answer is not None:
                    return answer
            time.sleep(LOOK_S)


class Pause:
    """A question that a flow run is paused for."""

    def __init__(self, client: SyncPrefectClient, run_id: UUID, question: str) -> None:
        self._client, self._run_id, self._question = client, run_id, question
        self._keys: Any = None

    def look(self, elsewhere: bool | None) -> bool | None:
        """Return the decision, once there is one; what was decided `elsewhere` resumes the run."""
        if self._keys is None:
            self._keys = self._begin()
        state = self._client.read_flow_run(self._run_id).state
        if state is None or state.is_paused():
            if elsewhere is not None:
                self._client.resume_flow_run(self._run_id, {"decision": "go on" if elsewhere else "stop"})
            return None
        if state.is_running():
            return cast("Decision", Decision.load(self._keys, self._run_id)).decision == "go on"
        raise self._ended(state)

    def _begin(self) -> Any:
        state = Paused(message=self._question, pause_key=uuid4().hex)
        keys: Any = keyset_from_paused_state(state)
        state.state_details.run_input_keyset = keys
        Decision.with_initial_data(description=self._question).save(keys, self._run_id)
        told = self._client.set_flow_run_state(self._run_id, state)
        if told.status != SetStateStatus.ACCEPT:
            raise self._ended(told.state)
        return keys

    def _ended(self, state: State[Any] | None) -> Stopped:
        if state and (state.is_cancelling() or state.is_cancelled()):
            return CancelledByPerson(f"Cancelled while it waited: {self._question} The same command asks again.")
        found = f"the flow run is {state.name}" if state else "the flow run could not be paused"
        return WaitsForPerson(f"{self._question} Nobody decided, and {found}: decide by srlm approve.")
