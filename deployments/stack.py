"""`make stack`: the services of docker-compose.yml as plain processes on the loopback, until Ctrl-C.

The commands are read from the compose file; only their surroundings differ. PostgreSQL is used where it is installed.
Each service is a child that ends with this process, however that ends (srlm_core/engines/child.py).
"""

import os
import re
import shlex
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import yaml

from deployments.postgres import Postgres
from srlm_core.engines.child import Child
from srlm_core.errors import SrlmError

COMPOSE = Path(__file__).parents[1] / "docker-compose.yml"
ENTRYPOINT = Path(__file__).parent / "docker" / "entrypoint.sh"
"""Of the images, too."""
SERVERS, SET_UP, WORKER = ("prefect", "mlflow"), "set-up", "worker-cpu"
STARTUP_S, GRACE_S = 180.0, 15.0


class Stopped(Exception):
    """Somebody asked for the end."""


class Addresses(NamedTuple):
    """Where the servers are."""

    prefect: str
    mlflow: str


def commands() -> dict[str, list[str]]:
    """Read what each service of the compose file runs, with the variables that are set here."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    return {name: shlex.split(interpolated(service.get("command", ""))) for name, service in services.items()}


def interpolated(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Fill in `${NAME}`, `${NAME:-default}` and `${NAME:+replacement}` as compose does."""

    def value(found: re.Match[str]) -> str:
        name, how, other = found["name"], found["how"], found["other"] or ""
        given = environment.get(name, "")
        return (other if given else "") if how == ":+" else given or other

    return re.sub(r"\$\{(?P<name>\w+)((?P<how>:[-+?])(?P<other>[^}]*))?\}", value, text)


def surroundings(root: Path, home: Path, database: Postgres | None, at: Addresses) -> dict[str, str]:
    """Say to every service where the others are: all on the loopback, everything it keeps below the root."""
    ports = [address.rpartition(":")[2] for address in at]
    return {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"{at.prefect}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": ports[0],
        "PREFECT_SERVER_UI_API_URL": f"{at.prefect}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url("prefect", "postgresql+asyncpg")
        if database
        else f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "MLFLOW_TRACKING_URI": at.mlflow,
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": ports[1],
        "MLFLOW_WORKERS": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": database.url("mlflow", "postgresql+psycopg2")
        if database
        else f"sqlite:///{home / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": str(home / "artifacts"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost:*,127.0.0.1:*",
        "SRLM_ROOT": str(root),
        "SRLM_SLOTS": "cpu",
        "DO_NOT_TRACK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(COMPOSE.parent), os.environ.get("PYTHONPATH")])),
    }


@contextmanager
def stack(root: Path, prefect_port: int = 4200, mlflow_port: int = 5000) -> Iterator[Addresses]:
    """Start everything, yield where it is, end everything.

    Raises SrlmError where a port is taken or a service does not come up, with its own last words.
    """
    at = Addresses(f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}")
    for port, setting in ((prefect_port, "SRLM_PREFECT_PORT"), (mlflow_port, "SRLM_MLFLOW_PORT")):
        _require_free(port, setting)
    home = root / ".stack"
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as up:
        database = up.enter_context(Postgres(home)) if Postgres.here() else None
        if database is None:
            _say("PostgreSQL is not installed: SQLite, which is enough for one person. `apt install postgresql`")
        around, run = surroundings(root, home, database, at), commands()
        services = {name: up.enter_context(_service(name, run[name], home, around)) for name in SERVERS}
        _await(services, {"prefect": f"{at.prefect}/api/health", "mlflow": f"{at.mlflow}/health"})
        with _service(SET_UP, run[SET_UP], home, around) as set_up:
            if set_up.wait(STARTUP_S) != 0:
                raise SrlmError(f"{SET_UP}: expected it to finish, but {set_up.obituary()}")
        services[WORKER] = up.enter_context(_service(WORKER, run[WORKER], home, around))
        _watched.update(services)
        yield at


_watched: dict[str, Child] = {}


@contextmanager
def _service(name: str, command: list[str], home: Path, around: Mapping[str, str]) -> Iterator[Child]:
    """Run one command as a child; first asked to end, then made to."""
    child = Child("deployments.command", ["sh", str(ENTRYPOINT), *command], log=home / f"{name}.log", env=around)
    try:
        yield child
    finally:
        child.process.terminate()
        child.close(GRACE_S)


def _require_free(port: int, setting: str) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SrlmError(
                f"expected port {port} of the loopback to be free, somebody serves there already. End that, or set "
                f"{setting} to another port."
            )


def _await(services: Mapping[str, Child], health: Mapping[str, str]) -> None:
    until = time.monotonic() + STARTUP_S
    for name, url in health.items():
        while not _answers(url):
            if services[name].wait(0.5) is not None or time.monotonic() > until:
                raise SrlmError(f"{name}: expected it to answer at {url}, but {services[name].obituary()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def _watch() -> NoReturn:
    """Wait until a service ends; it should not."""
    while True:
        for name, child in _watched.items():
            if child.wait(0.5) is not None:
                raise SrlmError(f"{name}: expected it to go on, but {child.obituary()}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped


def main() -> int:
    """Run the stack until Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    root = Path(os.environ.get("SRLM_ROOT", "runs")).resolve()
    ports: dict[str, Any] = {
        "prefect_port": int(os.environ.get("SRLM_PREFECT_PORT", "4200")),
        "mlflow_port": int(os.environ.get("SRLM_MLFLOW_PORT", "5000")),
    }
    try:
        with stack(root, **ports) as at:
            _say(
                f"Prefect   {at.prefect}   start a flow: Deployments, self-reward, Run\n"
                f"MLflow    {at.mlflow}   compare iterations: Experiments, srlm\n"
                f"campaigns {root}\nlogs      {root / '.stack'}\nCtrl-C stops all of it; nothing is lost."
            )
            _watch()
    except Stopped:
        _say("stopped.")
        return 0
    except SrlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
