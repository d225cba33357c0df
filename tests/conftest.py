"""Shared by all tests: a scripted campaign in milliseconds."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from srlm_core import loop, recipes, store
from srlm_core.backend import make_backend
from srlm_core.executor import PlainExecutor
from srlm_core.run import Run
from srlm_core.store import Campaign

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
hypothesis.settings.register_profile("shared", deadline=None)  # other tests run beside: a slow example is no failure
hypothesis.settings.load_profile("shared")

TINY = (
    "prompts.target=12", "engine.shard_rows=4", "seed_data.ift_rows=24", "seed_data.eft_groups=4",
    "evaluation.prompts=8", "evaluation.heldout_groups=6", "evaluation.text_judgments=8",
    "evaluation.bootstrap_samples=20",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes, a file stays in one, and so does all that works on the stack."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "the stack" if file.startswith("tests/deployments/") else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[..., Path]:
    """Run a scripted campaign with overrides; returns its folder."""

    def run(*overrides: str, name: str = "c", recipe: str = "self_rewarding", observers: Sequence[Any] = ()) -> Path:
        config = recipes.load(recipe, "smoke", overrides=[*TINY, *overrides])
        with Campaign(tmp_path, name) as campaign, PlainExecutor() as executor:
            campaign.logs.mkdir(exist_ok=True)
            store.write_json(campaign.folder / "config.json", config.model_dump(mode="json"))
            backend = make_backend(config, cache=tmp_path / ".cache", logs=campaign.logs)
            loop.self_reward(Run(config, campaign, executor, backend, observers))
        return campaign.folder

    return run


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Warnings of the campaign. Not caplog: Prefect's import puts handlers of its own in the place of the root's."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("srlm").addHandler(listener)
    yield said
    logging.getLogger("srlm").removeHandler(listener)
