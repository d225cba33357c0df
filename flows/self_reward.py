"""Self-rewarding language models as a flow: bootstrap, iterations, evaluation (arXiv:2401.10020).

M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

from prefect import flow, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows import ending, form, slots, worker
from flows.artifacts import Artifacts
from flows.campaign import run_campaign, workers
from flows.executor import PrefectExecutor
from srlm_core import loop, recipes, settings, store
from srlm_core.run import Run
from tasks.tracking import Tracking

__all__ = ["run_campaign", "self_reward", "show"]

_prepared: ContextVar[Run | None] = ContextVar("prepared", default=None)
FLOW_RUNS = "prefect.json"
"""In a campaign's folder: the ids of its flow runs, in order."""


def _run_name() -> str:
    asked = flow_run.parameters
    return asked["name"] or default_name(asked["recipe"], asked["size"])


def default_name(recipe: str, size: str | None) -> str:
    """Name a campaign after its recipe and size."""
    if recipe in recipes.SHORTCUTS and not size:
        return recipe
    config = recipes.load(form.recipe_file(recipe), size or None)
    return f"{config.recipe}-{config.size}"


@flow(name="self-reward", flow_run_name=_run_name)
def self_reward(
    recipe: form.Recipe = "self_rewarding",
    size: form.Size = "",
    name: form.Name = "",
    settings: form.Changed = form.NOTHING,
    overrides: list[form.Override] = [],  # noqa: B006 - the form needs the empty list, nothing changes it
    redo: bool = False,
) -> State[Any]:
    """Let a language model improve itself by its own judgments: bootstrap, iterations, evaluation.

    Args:
        recipe: The method, with its settings. smoke takes seconds and needs no model.
        size: smoke: seconds, no model. small: a 135M model, minutes on a processor. node: 8 GPUs. paper: as published.
        name: The campaign's name. The same name again goes on with it. Empty: recipe and size.
        settings: What differs from the recipe. An empty field is the recipe's own value.
        overrides: Settings that have no field here.
        redo: Go on though settings changed since the campaign began; what they change is made again.
    """
    run = _prepared.get()
    if run is not None:
        return _ended(run.campaign.folder, partial(_go_through, run))
    # started by a worker or a schedule: what the command line does before the loop is still to be done
    worker.end_with_worker()
    from flows.running import run_recipe

    config = recipes.load(form.recipe_file(recipe), size or None, form.spelled(settings, overrides))
    name = name or default_name(recipe, size)
    run_it = partial(
        run_recipe, config, name, form.root(), redo=redo, fork=None, use_prefect=True, use_mlflow=True, as_json=False
    )
    with slots.held(config):
        return _ended(form.root() / name, run_it)


def _ended(folder: Path, run: Callable[[], None]) -> State[Any]:
    return ending.told(run) or ending.completed(folder)


def show(run: Run, tracking: Tracking | None) -> None:
    """Run a campaign that is put together already, as the flow `self-reward` or inside the one that is under way."""
    artifacts = Artifacts(run.campaign, tracking.where if tracking else lambda: None)
    run.executor = executor = PrefectExecutor(workers(run.config))
    run.observers = [*run.observers, _Introduction(tracking), artifacts]
    token = _prepared.set(run)
    try:
        if FlowRunContext.get() is not None:
            _go_through(run)
        else:
            self_reward(**_asked(run))
    except Exception:
        executor.task_runs.settle()
        raise
    else:
        executor.task_runs.settle()
    finally:
        _prepared.reset(token)
        artifacts.close()


def _go_through(run: Run) -> None:
    """Run the loop inside the flow run that is under way, and note in the campaign's folder which one that is."""
    path, ours = run.campaign.folder / FLOW_RUNS, str(flow_run.id)
    earlier: list[str] = (store.read_json(path) or {"flow_runs": []})["flow_runs"]
    _close_dead_runs(UUID(ours), [UUID(one) for one in earlier if one != ours])
    store.write_json(path, {"flow_runs": [*(one for one in earlier if one != ours), ours]})
    loop.self_reward(run)


def _close_dead_runs(ours: UUID, earlier: list[UUID]) -> None:
    """Mark what an earlier process left running: we hold the campaign's lock, so nobody works on it any more."""
    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PAUSED]))
    message = "Its process ended without a word. The campaign goes on in a later run."
    with suppress(Exception), get_client(sync_client=True) as client:  # the seam: only tidiness is at stake
        # turns of this very run are there where it was started again
        parents = FlowRunFilterParentFlowRunId(any_=[ours, *earlier])
        dead = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parents, state=running))
        if earlier:
            ids = FlowRunFilterId(any_=earlier)
            dead += client.read_flow_runs(flow_run_filter=FlowRunFilter(id=ids, state=running))
        for left in dead:
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


def _asked(run: Run) -> dict[str, Any]:
    """Spell a resolved campaign as the form would: what differs from its recipe becomes overrides."""
    config = run.config
    shipped = config.recipe in recipes.names()  # else one of the user's own
    base = settings.flat(recipes.load(config.recipe if shipped else "self_rewarding", config.size if shipped else None))
    changed = {name: value for name, value in settings.flat(config).items() if base.get(name) != value}
    overrides = form.as_asked({name: value for name, value in changed.items() if name not in ("recipe", "size")})
    size = config.size if config.size in get_args(form.Size) else ""
    recipe = config.recipe if shipped else "self_rewarding"
    return {"recipe": recipe, "size": size, "name": run.campaign.name, "overrides": overrides}
