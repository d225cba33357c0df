"""Somebody who works with the stack, through the servers' own clients."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from deployments.stack import Stack

RUN_S = 300.0
PLANTED = {
    "OPENAI_API_KEY": "sk-planted-31415926",
    "HF_TOKEN": "hf_planted27182818",
    "AWS_SECRET_ACCESS_KEY": "planted/16180339",
    "MLFLOW_TRACKING_TOKEN": "planted-14142135",
}
"""What every service of the stack has in its environment, and nobody may ever read anywhere."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Team:
    """Somebody who works with the stack through the servers' own clients."""

    def __init__(self, stack: Stack, auth: str | None = None) -> None:
        self.stack, self.root, self._auth = stack, stack.root, auth

    @contextmanager
    def client(self) -> Iterator[Any]:
        from prefect import get_client
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        here: dict[Any, Any] = {PREFECT_API_URL: f"{self.stack.at.prefect}/api"}
        if self._auth is not None:
            here[PREFECT_API_AUTH_STRING] = self._auth
        with temporary_settings(here), get_client(sync_client=True) as client:
            yield client

    def start(self, deployment: str = "self-reward/self-reward", **parameters: Any) -> UUID:
        """Start a flow run as the form does."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def run(self, run_id: UUID) -> Any:
        with self.client() as client:
            return client.read_flow_run(run_id)

    def until(self, run_id: UUID, wanted: Callable[[Any], bool], timeout_s: float = RUN_S) -> Any:
        """Wait until a flow run's state is as wanted."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                run = self.run(run_id)
                if run.state is not None and wanted(run.state):
                    return run
            except Exception as error:  # a server that is away on purpose
                run = error
            assert time.monotonic() < end, (run, self.last_words())
            time.sleep(0.5)

    def finished(self, run_id: UUID, timeout_s: float = RUN_S) -> Any:
        return self.until(run_id, lambda state: state.is_final(), timeout_s)

    def last_words(self) -> str:
        logs = sorted(self.stack.home.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
