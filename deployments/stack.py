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
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Self

import yaml

from deployments.postgres import Postgres
from srlm_core.engines.child import Child
from srlm_core.errors import SrlmError

COMPOSE = Path(__file__).parents[1] / "docker-compose.yml"
ENTRYPOINT = Path(__file__).parent / "docker" / "entrypoint.sh"
"""Of the images, too."""
SERVERS, SET_UP, WORKER = ("prefect", "mlflow"), "set-up", "worker-cpu"
STARTUP_S, GRACE_S = 180.0, 15.0
SETTLED_S = 30.0
"""What lived shorter than this will not live longer the next time."""


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
        "SRLM_USERS": str(home / "users"),
        "SRLM_ROOT": str(root),
        "SRLM_SLOTS": "cpu",
        "DO_NOT_TRACK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(COMPOSE.parent), os.environ.get("PYTHONPATH")])),
    }


class Stack:
    """All services, started in their order on entering; each can be stopped and started again alone.

    Raises SrlmError where a port is taken or a service does not come up, with its own last words.
    """

    def __init__(self, root: Path, prefect_port: int = 4200, mlflow_port: int = 5000) -> None:
        self.root, self.home = root, root / ".stack"
        self.at = Addresses(f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}")
        self._ports = {"SRLM_PREFECT_PORT": prefect_port, "SRLM_MLFLOW_PORT": mlflow_port}
        self._health = {"prefect": f"{self.at.prefect}/api/health", "mlflow": f"{self.at.mlflow}/health"}
        self._commands = commands()
        self._services: dict[str, _Running] = {}
        self.database = Postgres(self.home) if Postgres.here() else None

    def __enter__(self) -> Self:
        for setting, port in self._ports.items():
            _require_free(port, setting)
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for name in reversed(list(self._services)):
            self.stop(name)
        if self.database is not None:
            self.database.stop()

    def _start_all(self) -> None:
        if self.database is not None:
            self.database.start()
        else:
            _say("PostgreSQL is not installed: SQLite, which is enough for one person. `apt install postgresql`")
        for name in SERVERS:
            self.start(name)
        self.await_servers()
        self.start(SET_UP)
        set_up = self._services[SET_UP].child
        if set_up.wait(STARTUP_S) != 0:
            raise SrlmError(f"{SET_UP}: expected it to finish, but {set_up.obituary()}")
        self.stop(SET_UP)
        self.start(WORKER)

    @property
    def environment(self) -> dict[str, str]:
        """What every service is told of the others; a client beside them needs the same."""
        return surroundings(self.root, self.home, self.database, self.at)

    def start(self, name: str) -> None:
        """Start one service."""
        command = ["sh", str(ENTRYPOINT), *self._commands[name]]
        child = Child("deployments.command", command, log=self.home / f"{name}.log", env=self.environment)
        self._services[name] = _Running(child, time.monotonic())

    def stop(self, name: str) -> None:
        """End one service: it is asked to, and then made to."""
        child = self._services.pop(name).child
        child.process.terminate()
        child.close(GRACE_S)

    def pid(self, name: str) -> int:
        """Return the process that runs a service."""
        return self._services[name].child.process.pid

    def await_servers(self) -> None:
        """Wait until both servers answer."""
        until = time.monotonic() + STARTUP_S
        for name, url in self._health.items():
            while not _answers(url):
                child = self._services[name].child
                if child.wait(0.5) is not None or time.monotonic() > until:
                    raise SrlmError(f"{name}: expected it to answer at {url}, but {child.obituary()}")

    def watch(self) -> NoReturn:
        """Start again what ends by itself, as compose would; raises SrlmError for what ends again at once."""
        while True:
            time.sleep(0.5)
            if self.database is not None and self.database.ended():
                _say("postgres ended, and is started again")
                self.database.stop()
                self.database.start()
            for name, (child, since) in list(self._services.items()):
                if child.process.poll() is None:
                    continue
                if time.monotonic() - since < SETTLED_S:
                    raise SrlmError(f"{name}: expected it to go on, but {child.obituary()}")
                _say(f"{name} ended, and is started again ({child.log})")
                child.close()
                self.start(name)


class _Running(NamedTuple):
    """A service that was started, and when."""

    child: Child
    since: float


def _require_free(port: int, setting: str) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SrlmError(
                f"expected port {port} of the loopback to be free, somebody serves there already. End that, or set "
                f"{setting} to another port."
            )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


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
        with Stack(root, **ports) as stack:
            at = stack.at
            _say(
                f"Prefect   {at.prefect}   start a flow: Deployments, self-reward, Run\n"
                f"MLflow    {at.mlflow}   compare iterations: Experiments, srlm\n"
                f"campaigns {root}\nlogs      {root / '.stack'}\nCtrl-C stops all of it; nothing is lost."
            )
            stack.watch()
    except Stopped:
        _say("stopped.")
        return 0
    except SrlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
