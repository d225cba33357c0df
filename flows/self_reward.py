"""Self-rewarding language models as a flow: bootstrap, iterations, evaluation (arXiv:2401.10020).

    M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import AfterValidator, Field

from flows.campaign import prepare, run_campaign, workers
from flows.executor import PrefectExecutor
from srlm_core import loop, recipes
from srlm_core.errors import ConfigError
from srlm_core.loop import Run

__all__ = ["run_campaign", "self_reward", "show"]

_prepared: ContextVar[Run | None] = ContextVar("prepared", default=None)


def _known_recipe(name: str) -> str:
    try:
        recipes.read(recipes.SHORTCUTS.get(name, (name, None))[0])
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


def _override(text: str) -> str:
    try:
        recipes.parse_override(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


Recipe = Annotated[str, AfterValidator(_known_recipe), Field(description="Name of a recipe that ships, or path of a TOML file.")]
Override = Annotated[str, AfterValidator(_override)]


@flow(name="self-reward", flow_run_name="{name}")
def self_reward(
    recipe: Recipe = "self_rewarding",
    size: str | None = None,
    name: str = "campaign",
    overrides: list[Override] = [],  # noqa: B006  the form shows it as an empty list; never changed
    root: str = "runs",
) -> None:
    """Let a language model improve itself by its own judgments, or go on with a campaign that was begun.

    Args:
        recipe: What to run; see `srlm recipes`.
        size: smoke (seconds, no model), demo, small, node or paper; empty for the recipe's own choice.
        name: The campaign: its folder under `root`. The same name again goes on where it stopped.
        overrides: Settings that differ from the recipe, each as key=value, such as responses.n=8.
        root: Folder of all campaigns, shared by the machines that work on them.
    """
    run = _prepared.get()
    if run is not None:
        loop.self_reward(run)
        return
    config = recipes.load(recipe, size, overrides)
    with prepare(config, Path(root), name) as run:
        run.executor = PrefectExecutor(workers(config))
        loop.self_reward(run)


def show(run: Run) -> None:
    """Run a campaign that was put together elsewhere, as this flow."""
    token = _prepared.set(run)
    try:
        self_reward(**asked(run))
    finally:
        _prepared.reset(token)
