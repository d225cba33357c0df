"""What must stay inside stays inside: secrets, and the servers themselves where a password is set."""

import json
import os
import subprocess
import tempfile
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from team import PLANTED, Team, free_port

from deployments.stack import Stack

pytestmark = [pytest.mark.cluster, pytest.mark.prefect, pytest.mark.timeout(600)]

IN_A_PROMPT, IN_A_SETTING = "planted-in-metadata-17320508", "planted-in-a-setting-22360679"


def kept(team: Team) -> Iterator[tuple[str, bytes]]:
    """Everything that the stack keeps: files, logs, artifacts, and its databases as text."""
    for path in team.root.rglob("*"):
        if path.is_file() and "postgres" not in path.parts:
            yield str(path.relative_to(team.root)), path.read_bytes()
    if team.stack.database is not None:
        for name in ("prefect", "mlflow"):
            database = team.stack.database
            yield f"database {name}", database._run("pg_dump", *database._where(name)).encode()


def test_a_secret_is_found_nowhere(team: Team) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    rows = [{"prompt": f"Name {n} fruits.", "metadata": {"token": IN_A_PROMPT}} for n in range(2, 8)]
    prompts = team.root / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    # an address with a password in it is refused before there is a run
    judge = f"model@http://me:{IN_A_SETTING}@127.0.0.1:9/v1"
    for wrong in (
        {"settings": {"evaluation_judge": judge}},
        {"overrides": [{"setting": "tracking.mlflow_uri", "value": f"http://me:{IN_A_SETTING}@127.0.0.1:9"}]},
    ):
        with pytest.raises(PrefectHTTPStatusError) as refused:
            team.start(recipe="smoke", name="secret", **wrong)
        assert refused.value.response.status_code == 409
    asked: dict[str, Any] = {"iterations": 1, "prompts_file": str(prompts), "prompts_file_share": 0.5}
    run = team.finished(team.start(recipe="smoke", name="planted", settings=asked))
    assert run.state.is_completed(), (run.state, team.last_words())
    prompts.unlink()
    found = {
        (where, secret)
        for where, text in kept(team)
        for secret in (*PLANTED.values(), IN_A_PROMPT, IN_A_SETTING)
        if secret.encode() in text
    }
    assert found == set()
    assert any(b"Name 3 fruits." in text for _, text in kept(team))  # the search would find what is there


def status(url: str, auth: str | None = None) -> int:
    request = urllib.request.Request(url, data=b"{}", headers={"Content-Type": "application/json"})
    if auth:
        request.add_header("Authorization", f"Basic {b64encode(auth.encode()).decode()}")
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


def test_one_setting_closes_both_servers_and_lets_their_clients_in(monkeypatch: pytest.MonkeyPatch) -> None:
    auth = "team:a-long-password-26457513"
    monkeypatch.setenv("SRLM_AUTH", auth)
    with tempfile.TemporaryDirectory(prefix="srlm-closed-") as folder:
        root = Path(folder)
        root.chmod(0o711)
        with Stack(root / "runs", free_port(), free_port()) as stack:
            prefect, mlflow = (
                f"{stack.at.prefect}/api/flow_runs/filter",
                f"{stack.at.mlflow}/api/2.0/mlflow/runs/search",
            )
            assert [status(prefect), status(mlflow)] == [401, 401]
            assert [status(prefect, "team:wrong-password-1"), status(mlflow, "team:wrong-password-1")] == [401, 401]
            assert status(prefect, auth) == 200
            assert status(mlflow, auth) in (200, 400)
            team = Team(stack, auth)
            run = team.finished(team.start(recipe="smoke", name="inside", settings={"iterations": 1}))
            assert run.state.is_completed(), (run.state, team.last_words())
            logs = "".join(path.read_text(errors="replace") for path in stack.home.glob("*.log"))
            assert auth.partition(":")[2] not in logs
            assert "inside" in _mlflow_runs(stack, auth)
            assert (stack.home / "users" / "users.db").exists()
            assert not Path("basic_auth.db").exists()  # where MLflow would keep them
            monkeypatch.setenv("SRLM_AUTH", newer := "team:another-password-33166247")
            stack.stop("mlflow")
            stack.start("mlflow")
            stack.await_servers()
            assert status(mlflow, auth) == 401
            assert status(mlflow, newer) in (200, 400)


def _mlflow_runs(stack: Stack, auth: str) -> str:
    user, _, password = auth.partition(":")
    asked = (
        "from tasks.tracking import connect; import sys; c = connect(sys.argv[1]);"
        "print([r.info.run_name for e in c.search_experiments() for r in c.search_runs([e.experiment_id])])"
    )
    known = os.environ | {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    python = str(Path(stack.environment["PATH"].split(os.pathsep)[0]) / "python")
    return subprocess.run([python, "-c", asked, stack.at.mlflow], env=known, capture_output=True, text=True).stdout
