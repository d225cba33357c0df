"""A campaign every night: a new one of its own seed, or one more iteration of the last."""

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled
from pydantic import Field

from flows import ending, form, slots, worker
from flows.self_reward import default_name
from srlm_core import recipes, store, weights
from srlm_core.config import RunConfig

Each = Literal["new campaign", "one more iteration"]


@flow(name="nightly-rerun", flow_run_name="{recipe}-nightly")
def nightly_rerun(
    recipe: form.Recipe = "self_rewarding",
    size: form.Size = "",
    each: Each = "new campaign",
    latest_start_minutes: Annotated[int, Field(ge=1)] = 60,
    settings: form.Changed = form.NOTHING,
    overrides: list[form.Override] = [],  # noqa: B006 - the form needs the empty list, nothing changes it
) -> State[Any]:
    """Run a recipe again on a schedule: a campaign per date, with the date as its seed, or one that grows.

    Args:
        recipe: The method, with its settings.
        size: smoke, small, node, paper. Empty: the recipe's own.
        each: A new campaign named by recipe and date, or the newest of this recipe goes on by one iteration.
        latest_start_minutes: Minutes after its time at which a run is skipped instead of being made up for.
        settings: What differs from the recipe. An empty field is the recipe's own value.
        overrides: Settings that have no field here.
    """
    worker.end_with_worker()
    due = flow_run.scheduled_start_time or datetime.now(UTC)
    late = datetime.now(UTC) - due
    if late > timedelta(minutes=latest_start_minutes):
        minutes = int(late.total_seconds() // 60)
        return Cancelled(message=f"Skipped: due {minutes} minutes ago, latest_start_minutes={latest_start_minutes}.")
    from flows.running import run_recipe

    config = recipes.load(form.recipe_file(recipe), size or None, form.spelled(settings, overrides))
    name, config = tonight(config, default_name(recipe, size), due, form.root(), extend=each == "one more iteration")
    run_it = partial(
        run_recipe, config, name, form.root(), redo=False, fork=None, use_prefect=True, use_mlflow=True, as_json=False
    )
    with slots.held(config):
        return ending.told(run_it) or ending.completed(form.root() / name)


def tonight(config: RunConfig, base: str, due: datetime, root: Path, *, extend: bool) -> tuple[str, RunConfig]:
    """Name tonight's campaign and settle its seed and iterations.

    A new one is called `BASE-2026-11-23` and its seed is 20261123; run again on the same date, it goes on. `extend`:
    the newest campaign of that name that is finished gets one iteration more, with the settings it was begun with.
    """
    earlier = sorted(root.glob(f"{base}-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]/config.json"))
    if extend and earlier:
        newest = earlier[-1].parent
        begun = recipes.validate(store.read_json(newest / "config.json"))
        last = weights.marker(newest, f"M{begun.iterations + 1}")
        more = 0 if last is None else 1  # one that was cut off goes on first
        return newest.name, begun.model_copy(update={"iterations": begun.iterations + more})
    return f"{base}-{due:%Y-%m-%d}", config.model_copy(update={"seed": int(f"{due:%Y%m%d}")})
