"""Self-rewarding language models as a flow: bootstrap, iterations, evaluation (arXiv:2401.10020).

M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Crashed
from pydantic import AfterValidator, Field

from flows import ending
from flows.artifacts import Artifacts
from flows.campaign import run_campaign, workers
from flows.executor import PrefectExecutor
from srlm_core import loop, recipes, settings
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError
from srlm_core.run import Run
from tasks.tracking import Tracking

__all__ = ["run_campaign", "self_reward", "show"]

_prepared: ContextVar[Run | None] = ContextVar("prepared", default=None)


def _known_recipe(name: str) -> str:
    try:
        recipes.read(recipes.SHORTCUTS.get(name, (name, None))[0])
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


def override(text: str) -> str:
    """Check one that the form was given."""
    try:
        recipes.parse_override(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


def _run_name() -> str:
    asked = flow_run.parameters
    return asked["name"] or default_name(asked["recipe"], recipes.load(asked["recipe"], asked["size"]))


def default_name(recipe: str, config: RunConfig) -> str:
    """Name a campaign after its recipe and size."""
    return recipe if recipe in recipes.SHORTCUTS else f"{config.recipe}-{config.size}"


Recipe = Annotated[str, AfterValidator(_known_recipe), Field(description="A recipe, or the path of a TOML file.")]
Size = Annotated[str | None, Field(description="smoke, demo, small, node, paper; empty: the recipe's own.")]
Name = Annotated[str, Field(description="The same name again goes on with a campaign. Empty: recipe and size.")]
Overrides = Annotated[
    list[Annotated[str, AfterValidator(override)]], Field(description="Settings as key=value: responses.n=8")
]
Root = Annotated[str, Field(description="Folder of all campaigns, shared by the machines that work on them.")]
Redo = Annotated[bool, Field(description="Go on though settings changed; what they change is made again.")]


@flow(name="self-reward", flow_run_name=_run_name)
def self_reward(
    recipe: Recipe = "self_rewarding",
    size: Size = None,
    name: Name = "",
    overrides: Overrides = [],  # noqa: B006 - the form needs the empty list, nothing changes it
    root: Root = "runs",
    redo: Redo = False,
) -> State[Any]:
    """Let a language model improve itself by its own judgments: bootstrap, iterations, evaluation."""
    run = _prepared.get()
    if run is not None:
        return _ended(run.campaign.folder, partial(loop.self_reward, run))
    # started by a worker or a schedule: what the command line does before the loop is still to be done
    from flows.running import run_recipe

    config = recipes.load(recipe, size, overrides)
    name = name or default_name(recipe, config)
    run_it = partial(
        run_recipe, config, name, Path(root), redo=redo, fork=None, use_prefect=True, use_mlflow=True, as_json=False
    )
    return _ended(Path(root) / name, run_it)


def _ended(folder: Path, run: Callable[[], None]) -> State[Any]:
    return ending.told(run) or ending.completed(folder)


def show(run: Run, tracking: Tracking | None) -> None:
    """Run a campaign that is put together already, as the flow `self-reward` or inside the one that is under way."""
    artifacts = Artifacts(run.campaign, tracking.where if tracking else lambda: None)
    run.executor = PrefectExecutor(workers(run.config))
    run.observers = [*run.observers, _Introduction(tracking), artifacts]
    token = _prepared.set(run)
    try:
        _close_dead_runs(run)
        if FlowRunContext.get() is not None:
            loop.self_reward(run)
        else:
            self_reward(*_asked(run))
    finally:
        _prepared.reset(token)
        artifacts.close()


def _close_dead_runs(run: Run) -> None:
    """Mark what an earlier process left running: we hold the campaign's lock, so nobody works on it any more."""
    current = FlowRunContext.get()
    ours = current.flow_run.id if current and current.flow_run else None
    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PAUSED]))
    message = "Its process ended without a word. The campaign goes on in a later run."
    with suppress(Exception), get_client(sync_client=True) as client:  # the seam: only tidiness is at stake
        named = FlowRunFilter(name=FlowRunFilterName(any_=[run.campaign.name]), state=running)
        for dead in client.read_flow_runs(flow_run_filter=named):
            if dead.id != ours and dead.parameters.get("root") == str(run.campaign.root):
                parent = FlowRunFilterParentFlowRunId(any_=[dead.id])
                turns = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent, state=running))
                for left in [*turns, dead]:
                    client.set_flow_run_state(left.id, Crashed(message=message), force=True)


class _Introduction:
    """Tells MLflow, with the campaign's first event, which flow run it belongs to."""

    def __init__(self, tracking: Tracking | None) -> None:
        self._tracking = tracking

    def __call__(self, what: str, details: dict[str, object]) -> None:
        if self._tracking is not None:
            top = str(flow_run.root_flow_run_id or flow_run.id)
            pages, _, _ = str(flow_run.ui_url).rpartition("/")
            self._tracking.note(**{"prefect.flow_run_id": top, "prefect.url": f"{pages}/{top}"})
            self._tracking = None


def _asked(run: Run) -> tuple[str, str | None, str, list[str], str]:
    """Spell a resolved campaign as the form would: what differs from its recipe becomes overrides."""
    config = run.config
    try:
        base = settings.flat(recipes.load(config.recipe, config.size))
    except ConfigError:  # a recipe of the user's own
        base = settings.flat(recipes.load("self_rewarding"))
    changed = {name: value for name, value in settings.flat(config).items() if base.get(name) != value}
    overrides = [f"{name}={value}" for name, value in changed.items() if name not in ("recipe", "size")]
    recipe = config.recipe if config.recipe in recipes.names() else "self_rewarding"
    return recipe, config.size, run.campaign.name, overrides, str(run.campaign.root)
