"""PostgreSQL of the stack: its own cluster below the root, reached through a socket that only we may open."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from srlm_core.engines.child import Child
from srlm_core.errors import SrlmError

DATABASES = ("prefect", "mlflow")
STARTUP_S = 60
DEBIANS = "/usr/lib/postgresql/*/bin"
"""Debian keeps the server's programs off the path."""


class Postgres:
    """A server that can be stopped and started again; no port is opened. Where we are root, it runs as its own user."""

    def __init__(self, home: Path) -> None:
        self._data, self._log = home / "postgres", home / "postgres.log"
        # a socket's path may be 107 bytes long, and a root's may be longer
        self._sockets = Path(tempfile.gettempdir()) / f"srlm-pg-{secrets.token_hex(4)}"
        self._child: Child | None = None

    @staticmethod
    def here() -> bool:
        """Whether it is installed, and there is a user to run it as."""
        return _program("postgres") is not None and (os.geteuid() != 0 or _servant() is not None)

    def start(self) -> None:
        """Start it; lay out the cluster and its databases where they are not there yet."""
        self._sockets.mkdir(mode=0o700)  # whoever made it before us has no business there
        self._data.mkdir(mode=0o700, exist_ok=True)
        servant = _servant() if os.geteuid() == 0 else None
        if servant is not None:
            for folder in (self._sockets, self._data):
                os.chown(folder, servant.pw_uid, servant.pw_gid)
        if not (self._data / "PG_VERSION").exists():
            self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "srlm", "-E", "UTF8", "--no-sync")
        serve = [*self._as("postgres"), "-D", str(self._data), "-k", str(self._sockets), "-c", "listen_addresses="]
        self._child = Child("deployments.command", serve, log=self._log)
        self._await()
        for name in DATABASES:
            found = self._run(
                "psql", *self._where("postgres"), "-tAc", f"select 1 from pg_database where datname='{name}'"
            )
            if not found.strip():
                self._run("createdb", *self._where(name))

    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self._child is not None and self._child.process.poll() is not None

    def stop(self) -> None:
        """End it cleanly."""
        if self._child is not None:
            self._child.process.terminate()  # passed on as SIGINT: a fast, clean end
            self._child.close(15.0)
            self._child = None
        shutil.rmtree(self._sockets, ignore_errors=True)

    def url(self, database: str, driver: str) -> str:
        """Return a database's address for SQLAlchemy."""
        return f"{driver}://srlm@/{database}?host={self._sockets}"

    def _where(self, database: str) -> list[str]:
        return ["-h", str(self._sockets), "-U", "srlm", *(["-d"] if database == "postgres" else []), database]

    def _await(self) -> None:
        assert self._child is not None
        for _ in range(2 * STARTUP_S):
            asked = [*self._as("pg_isready"), "-h", str(self._sockets)]
            if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
                return
            if self._child.wait(0.5) is not None:
                break
        raise SrlmError(f"postgres: expected it to start, but {self._child.obituary()}")

    def _run(self, program: str, *words: str) -> str:
        done = subprocess.run([*self._as(program), *words], capture_output=True, text=True, check=False, cwd="/")
        if done.returncode:
            raise SrlmError(f"postgres: expected {program} to succeed, got: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def _as(self, program: str) -> list[str]:
        """Spell a program with who runs it: PostgreSQL refuses to be root."""
        found = _program(program) or _program("postgres")
        assert found is not None
        path = str(Path(found).with_name(program))
        servant = _servant() if os.geteuid() == 0 else None
        if servant is None:
            return [path]
        return ["setpriv", "--reuid", servant.pw_name, "--regid", str(servant.pw_gid), "--clear-groups", path]


def _program(name: str) -> str | None:
    found = [str(path / name) for path in sorted(Path("/").glob(DEBIANS[1:]), reverse=True)]
    return shutil.which(name) or next((path for path in found if os.access(path, os.X_OK)), None)


def _servant() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None
