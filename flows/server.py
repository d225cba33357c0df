"""The Prefect server that a campaign brings along: a child on the loopback that ends with this process.

Its home is <root>/.prefect, not the user's; nothing calls home. Where a real server is configured, that one is used.
Run as a module, under engines/child.py, this file is the child: it serves on the listening socket it was handed.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

PORT = 4200
"""Tried first, so that a browser tab survives a resume; any free port otherwise."""
STARTUP_S = 120.0
"""A first start lays out the database: 10 s on an idle machine."""
SHUTDOWN_S = 8.0
_ours: set[str] = set()

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "srlm",  # the campaign's log lines appear beside the runs they belong to
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_CLI_PROMPT": "false",
}
"""Settings of both sides."""

SERVER = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_API_DATABASE_MIGRATE_ON_START": "false",  # done before, see migrate
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",  # no block is used, and a second is saved
    # nothing is scheduled here: what would look for it every few seconds stays off
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
}  # fmt: skip
"""Settings of the child."""


class PrefectServer:
    """Started on entering, in the background; `ready` waits for it."""

    def __init__(self, root: Path) -> None:
        self.home = root / ".prefect"
        self.url = ""
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        configured = configured_api()
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        if configured:
            self.url = configured
            return self
        self.home.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("PREFECT_HOME", str(self.home))
        with _listen() as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self._child = self._start(listening)
        # the common case: prefect is imported after this line, and every thread of it finds the address
        os.environ["PREFECT_API_URL"] = self.url
        _ours.add(self.url)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._child is None:
            return
        if os.environ.get("PREFECT_API_URL") == self.url:
            del os.environ["PREFECT_API_URL"]
        _ours.discard(self.url)
        self._child.terminate()
        try:
            self._child.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child = None

    @property
    def ui(self) -> str:
        """Address of the pages."""
        return self.url.removesuffix("/api")

    def ready(self) -> bool:
        """Wait until the server answers; False where it does not, its last words in the log."""
        if self._child is None:
            return _answers(self.url, 10.0)
        # the kernel keeps the request until the child serves; when the child dies it is refused
        return _answers(self.url, STARTUP_S)

    def last_words(self) -> str:
        """Return what the child said last, and where the rest is."""
        path = self.home / "server.log"
        said = path.read_text(errors="replace").strip().splitlines() if self._child and path.exists() else []
        return f"{said[-1][:200]} ({path})" if said else ""

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Point Prefect here, also where it was imported before."""
        if self._child is None:
            yield
            return
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        # no automation listens for heartbeats here, and each flow would wait a second for its own to end
        here: dict[Any, Any] = {PREFECT_API_URL: self.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with _unheard(), temporary_settings(here):
            try:
                yield
            finally:
                _drain()

    def _start(self, listening: socket.socket) -> subprocess.Popen[bytes]:
        fd = listening.fileno()
        with (self.home / "server.log").open("ab") as words:
            return subprocess.Popen(
                # -P: a folder named flows where the user stands is not ours
                [sys.executable, "-P", "-m", "srlm_core.engines.child", "flows.server", str(fd)],
                stdin=subprocess.PIPE, stdout=words, stderr=words, start_new_session=True, pass_fds=(fd,),
                env=self._environment(),
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        here = str(Path(__file__).parents[1])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH")) if part)
        own = {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url}
        return kept | QUIET | SERVER | own | {"PYTHONPATH": path, "SRLM_PARENT_PID": str(os.getpid())}


def configured_api(environment: Mapping[str, str] = os.environ) -> str | None:
    """Find a real server's address: in the environment, in Prefect where it is loaded, or in the user's profile."""
    url = environment.get("PREFECT_API_URL")
    if url and url not in _ours:
        return url
    if "prefect" in sys.modules:
        from prefect.settings import PREFECT_API_URL

        found = PREFECT_API_URL.value()
        return found if found not in _ours else None
    home = Path(environment.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = environment.get("PREFECT_PROFILE", profiles.get("active"))
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _listen() -> socket.socket:
    for port in (PORT, 0):
        try:
            return socket.create_server(("127.0.0.1", port), backlog=128)
        except OSError:
            continue
    raise OSError("no port is free on 127.0.0.1")


def _answers(url: str, timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=left) as response:
                return response.status == 200
        except urllib.error.HTTPError:
            return False
        except TimeoutError:
            return False
        except OSError as error:
            if not isinstance(getattr(error, "reason", error), InterruptedError):
                return False
    return False


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep what Prefect says of every run off the terminal: its pages have it, and the console has its own lines."""
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs", "EventsWorker")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers[:2]:
        logger.propagate = False
    loggers[2].setLevel(logging.ERROR)  # it warns while it drains
    try:
        yield
    finally:
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.propagate, logger.level = propagate, level


def _drain() -> None:
    """Send what is still queued for the server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=SHUTDOWN_S, at_exit=False)


# --- the child ------------------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Lay out or update the database, then serve until told to stop."""
    import gc

    gc.disable()  # a fifth off the start: it is all imports
    import uvicorn
    from prefect.server.api.server import create_app

    migrate(Path(os.environ["PREFECT_HOME"]))
    config = uvicorn.Config(create_app(final=True), log_level="warning", timeout_graceful_shutdown=2, lifespan="on")
    gc.enable()
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)])


def migrate(home: Path) -> None:
    """Bring the database up to date; one that this Prefect cannot read is set aside, and a new one begun."""
    from filelock import FileLock

    # two campaigns under one root share the database; only one of them may lay it out
    with FileLock(home / "migration.lock"):
        try:
            _upgrade()
        except Exception as error:
            for path in home.glob("prefect.db*"):
                path.rename(path.with_name(f"unreadable-{int(time.time())}-{path.name}"))
            sys.stderr.write(f"the database could not be read and was set aside: {error}\n")
            _upgrade()


def _upgrade() -> None:
    import asyncio

    from prefect.server.database import provide_database_interface

    async def upgrade() -> Any:
        database = provide_database_interface()
        await database.create_db()
        await (await database.engine()).dispose()

    asyncio.run(upgrade())


if __name__ == "__main__":
    main(int(sys.argv[1]))
