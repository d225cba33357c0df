"""Prefect and MLflow are watched with, not stood on: a campaign runs without either."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.server import PrefectServer


@pytest.mark.parametrize("package", ["prefect", "mlflow"])
def test_a_campaign_runs_where_it_is_not_installed(
    package: str, campaign: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    folder = campaign(tmp_path, prefect=package == "prefect", mlflow=package == "mlflow")
    assert (folder / "models" / "M2" / "complete.json").exists()
    assert [line for line in told if package in line] == [
        f"{package} is not installed, so the campaign runs without it: pip install srlm[{package}]"
    ]


def test_a_campaign_runs_where_no_server_answers(
    campaign: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    folder = campaign(tmp_path)
    assert (folder / "models" / "M2" / "complete.json").exists()
    assert [line for line in told if "Prefect server" in line] == [
        "No Prefect server answers at http://127.0.0.1:9/api, so the campaign runs without it. "
    ]


def test_a_server_that_is_configured_is_used_and_none_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with PrefectServer(tmp_path) as server:
        assert server.url == "http://127.0.0.1:9/api"
        assert not server.ready()
    assert not (tmp_path / ".prefect").exists()
