"""Methods against one another: campaigns that are read or run, one table, one page, and both as Prefect artifacts."""

from collections.abc import Callable
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from pydantic import Field

from flows import comparing, form, slots, worker
from flows.ending import told
from srlm_core import standings
from srlm_core.config import RunConfig

Compared = Annotated[
    list[Annotated[str, Field(pattern=r"^(campaign:|recipe:)?[A-Za-z0-9][A-Za-z0-9_.-]*$")]], Field(min_length=2)
]
Seeds = Annotated[int, Field(ge=1, le=1000)]
Tokens = Annotated[int, Field(ge=0)]


@flow(name="compare")
def compare(
    names: Compared,
    size: form.Size = "",
    seeds: Seeds = 1,
    tokens: Tokens = 0,
    name: form.Name = "",
    settings: form.Changed = form.NOTHING,
    overrides: list[form.OverrideOf] = [],  # noqa: B006 - the form needs the empty list, nothing changes it
    redo: bool = False,
) -> list[dict[str, Any]]:
    """Run or read several methods on one prompt set, and put them into one table, each number with its error.

    Args:
        names: Campaigns, which are read, and recipes, which are run; what is both is read, and recipe:NAME is run.
        size: Of the recipes. Empty: small, or a recipe's first.
        seeds: Each recipe is run with the seeds 0 to n - 1.
        tokens: Tokens that each method is to generate; sets prompts.target by the plan. 0: as the recipes say.
        name: Begins the campaigns' names. Empty: compare and the size.
        settings: What differs from all the recipes. An empty field is the recipe's own value.
        overrides: Settings that have no field here, or are for one recipe.
        redo: Go on though settings changed since; what they change is made again.
    """
    worker.end_with_worker()
    sets = form.spelled(settings, overrides)
    asked = comparing.Asked(names, size or None, seeds, sets, tokens or None, name or None, redo=redo)
    table, page = comparing.compare(form.root(), asked, _as_sub_flow)
    rows, head = standings.as_dicts(table), " against ".join(row.name for row in table)
    grid = standings.grid(table)
    shown = [dict(zip(grid[0], line, strict=True)) for line in grid[1:]]
    create_table_artifact(shown, "comparison", head)
    create_markdown_artifact(f"{standings.as_markdown(table)}\n\n{page}\n", "comparison-report", head)
    return rows


@flow(flow_run_name="{name}", validate_parameters=False)
def campaign(name: str, run: Callable[[], None]) -> State[Any] | None:
    """Run one campaign of the comparison."""
    return told(run)


def _as_sub_flow(config: RunConfig, name: str, run: Callable[[], None]) -> None:
    with slots.held(config):
        campaign(name, run)
