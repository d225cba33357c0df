"""Self-rewarding language models as a flow: bootstrap, iterations, evaluation (arXiv:2401.10020).

    M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

from prefect import flow, runtime
from prefect.context import FlowRunContext
from pydantic import AfterValidator, Field

from flows.artifacts import Artifacts
from flows.campaign import run_campaign, workers
from flows.executor import PrefectExecutor
from srlm_core import loop, recipes, settings
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError
from srlm_core.loop import Run
from tasks.tracking import Tracking

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


def _run_name() -> str:
    asked = runtime.flow_run.parameters
    return asked["name"] or default_name(asked["recipe"], recipes.load(asked["recipe"], asked["size"]))


def default_name(recipe: str, config: RunConfig) -> str:
    """Name a campaign after its recipe and size."""
    return recipe if recipe in recipes.SHORTCUTS else f"{config.recipe}-{config.size}"


@flow(name="self-reward", flow_run_name=_run_name)
def self_reward(
    recipe: Annotated[str, AfterValidator(_known_recipe), Field(description="A recipe, or the path of a TOML file.")] = "self_rewarding",
    size: Annotated[str | None, Field(description="smoke, demo, small, node, paper; empty: the recipe's own.")] = None,
    name: Annotated[str, Field(description="The same name again goes on with a campaign. Empty: recipe and size.")] = "",
    overrides: Annotated[
        list[Annotated[str, AfterValidator(_override)]], Field(description="Settings as key=value: responses.n=8")
    ] = [],  # noqa: B006 - the form needs the empty list, nothing changes it
    root: Annotated[str, Field(description="Folder of all campaigns, shared by the machines that work on them.")] = "runs",
    redo: Annotated[bool, Field(description="Go on though settings changed; what they change is made again.")] = False,
) -> None:
    """Let a language model improve itself by its own judgments: bootstrap, iterations, evaluation."""
    run = _prepared.get()
    if run is not None:
        loop.self_reward(run)
        return
    # started by a worker or a schedule: what the command line does before the loop is still to be done
    from flows.running import run_recipe

    config = recipes.load(recipe, size, overrides)
    name = name or default_name(recipe, config)
    run_recipe(config, name, Path(root), redo=redo, fork=None, use_prefect=True, use_mlflow=True, as_json=False)


def show(run: Run, tracking: Tracking | None) -> None:
    """Run a campaign that is put together already, as the flow `self-reward` or inside the one that is under way."""
    artifacts = Artifacts(run.campaign, tracking.where if tracking else lambda: None)
    run.executor = PrefectExecutor(workers(run.config))
    run.observers = [*run.observers, _Introduction(tracking), artifacts]
    token = _prepared.set(run)
    try:
        if FlowRunContext.get() is not None:
            loop.self_reward(run)
        else:
            self_reward(**_asked(run))
    finally:
        _prepared.reset(token)
        artifacts.close()


class _Introduction:
    """Tells MLflow, with the campaign's first event, which flow run it belongs to."""

    def __init__(self, tracking: Tracking | None) -> None:
        self._tracking = tracking

    def __call__(self, what: str, details: dict[str, object]) -> None:
        if self._tracking is not None:
            top = runtime.flow_run.root_flow_run_id or runtime.flow_run.id
            self._tracking.note(**{"prefect.flow_run_id": str(top), "prefect.url": str(runtime.flow_run.ui_url)})
            self._tracking = None


def _asked(run: Run) -> dict[str, object]:
    """Spell a resolved campaign as the form would: what differs from its recipe becomes overrides."""
    config = run.config
    try:
        base = settings.flat(recipes.load(config.recipe, config.size))
    except ConfigError:  # a recipe of the user's own
        base = settings.flat(RunConfig())
    changed = {name: value for name, value in settings.flat(config).items() if base.get(name) != value}
    overrides = [f"{name}={value}" for name, value in changed.items() if name not in ("recipe", "size")]
    recipe = config.recipe if config.recipe in recipes.names() else "self_rewarding"
    return {"recipe": recipe, "size": config.size, "name": run.campaign.name, "overrides": overrides, "root": str(run.campaign.root)}
