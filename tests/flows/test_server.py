"""The server that a campaign brings along lives no longer than the campaign."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flows.server import configured_api

ROOT = Path(__file__).parents[2]
CAMPAIGN = """
import sys, time
from pathlib import Path
from flows.server import PrefectServer
with PrefectServer(Path(sys.argv[1])) as server:
    print(server._child.pid, server.url, server.ready(), flush=True)
    time.sleep(600)
"""


@pytest.mark.prefect
def test_kill_9_leaves_no_server_and_an_unreadable_database_is_set_aside(tmp_path: Path) -> None:
    home = tmp_path / ".prefect"
    home.mkdir()
    (home / "prefect.db").write_text("this is no database")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    started = [sys.executable, "-c", CAMPAIGN, str(tmp_path)]
    campaign = subprocess.Popen(
        started, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=kept | {"HOME": str(tmp_path)}
    )
    assert campaign.stdout is not None
    pid, url, ready = campaign.stdout.readline().split()
    try:
        assert ready == "True", (home / "server.log").read_text()
        assert [path.read_text() for path in home.glob("unreadable-*")] == ["this is no database"]
        assert urllib.request.urlopen(f"{url}/health").status == 200
    finally:
        campaign.send_signal(signal.SIGKILL)
        campaign.wait()
    until = time.monotonic() + 5
    while (alive := _runs(int(pid))) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_the_address_comes_from_the_environment_or_the_profile_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    profiles = 'active = "team"\n[profiles.team]\nPREFECT_API_URL = "http://team:4200/api"\n[profiles.own]\n'
    (tmp_path / "profiles.toml").write_text(profiles)
    home = {"PREFECT_HOME": str(tmp_path)}
    assert configured_api(home | {"PREFECT_API_URL": "http://here/api"}) == "http://here/api"
    assert configured_api(home) == "http://team:4200/api"
    assert configured_api(home | {"PREFECT_PROFILE": "own"}) is None
    assert configured_api({"PREFECT_HOME": str(tmp_path / "none")}) is None
