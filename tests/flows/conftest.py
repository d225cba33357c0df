"""One Prefect server for all tests of this folder, and scripted campaigns that are run through it."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flows import server as servers
from flows.campaign import run_campaign
from flows.server import PrefectServer
from srlm_core import recipes, store
from srlm_core.backend import Backend, make_backend
from srlm_core.store import Campaign

TINY = (
    "prompts.target=8", "engine.shard_rows=4", "seed_data.ift_rows=24", "seed_data.eft_groups=4", "iterations=1",
    "evaluation.prompts=8", "evaluation.heldout_groups=6", "evaluation.text_judgments=8",
    "evaluation.bootstrap_samples=20",
)  # fmt: skip


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server that campaigns take for one that was there before them, as on a cluster."""
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as here, pytest.MonkeyPatch.context() as patch:
        assert here.ready(), here.last_words()
        with here.settings():
            patch.setattr(servers, "_ours", set())
            patch.setenv("PREFECT_API_URL", here.url)
            yield here


@pytest.fixture(scope="session")
def campaign() -> Callable[..., Path]:
    """Run a scripted campaign under a root; returns its folder."""

    def run(
        root: Path,
        *overrides: str,
        name: str = "c",
        prefect: bool = True,
        mlflow: bool = False,
        observers: Sequence[Any] = (),
        change: Callable[[Backend], Backend] = lambda backend: backend,
    ) -> Path:
        config = recipes.load("smoke", overrides=[*TINY, *overrides])
        with Campaign(root, name) as opened:
            opened.logs.mkdir(exist_ok=True)
            store.write_json(opened.config_path, config.model_dump(mode="json"))
            backend = change(make_backend(config, cache=root / ".cache", logs=opened.logs))
            run_campaign(config, opened, backend=backend, observers=observers, use_prefect=prefect, use_mlflow=mlflow)
        return opened.folder

    return run


@pytest.fixture(autouse=True)
def _no_address_is_left_behind() -> Iterator[None]:
    before = os.environ.get("PREFECT_API_URL")
    yield
    assert os.environ.get("PREFECT_API_URL") == before
