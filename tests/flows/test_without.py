"""Prefect and MLflow are watched with, not stood on: a campaign runs without either."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.server import PrefectServer

ROOT = Path(__file__).parents[2]


WITHOUT = """
import sys
sys.modules |= {"prefect": None, "mlflow": None}
from pathlib import Path
from flows.campaign import run_campaign
from srlm_core import recipes
from srlm_core.backend import make_backend
from srlm_core.store import Campaign
small = ["prompts.target=4", "iterations=1", "seed_data.eft_groups=4", 'evaluation.models="none"']
config, root = recipes.load("smoke", overrides=small), Path(sys.argv[1])
with Campaign(root, "c") as campaign:
    backend = make_backend(config, cache=root / ".cache", logs=campaign.logs)
    campaign.logs.mkdir()
    run_campaign(config, campaign, backend=backend, use_prefect=True, use_mlflow=True)
"""


def test_a_campaign_runs_where_neither_is_installed(tmp_path: Path) -> None:
    # a process of its own: one that has loaded Prefect cannot do without it any more
    asked = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "models" / "M2" / "complete.json").exists()
    for package in ("prefect", "mlflow"):
        told = f"{package} is not installed, so the campaign runs without it: pip install srlm[{package}]"
        assert done.stderr.count(told) == 1


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
