"""Methods against one another: campaigns that are read or run, one table, one page, and both as Prefect artifacts."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from pydantic import AfterValidator, Field

from flows import comparing
from flows.ending import told
from flows.self_reward import Redo, Root, Size, override
from srlm_core import standings


def _override(text: str) -> str:
    override(text.rpartition(":")[2] if ":" in text.partition("=")[0] else text)
    return text


Names = Annotated[
    list[str],
    Field(description="Campaigns, which are read, and recipes, which are run; what is both is read.", min_length=2),
]
Overrides = Annotated[
    list[Annotated[str, AfterValidator(_override)]],
    Field(description="Settings as key=value; of one recipe alone as recipe:key=value."),
]


@flow(name="compare")
def compare(
    names: Names,
    root: Root = "runs",
    size: Size = None,
    seeds: Annotated[int, Field(description="Run each recipe with the seeds 0 to n - 1.", ge=1, le=1000)] = 1,
    overrides: Overrides = [],  # noqa: B006 - the form needs the empty list, nothing changes it
    tokens: Annotated[
        int | None, Field(description="Tokens that each method is to generate; empty: as the recipes say.", ge=1)
    ] = None,
    name: Annotated[str | None, Field(description="Begins the campaigns' names. Empty: compare-SIZE.")] = None,
    model: Annotated[str | None, Field(description="Your own model: a checkpoint folder or hub id.")] = None,
    prompts: Annotated[str | None, Field(description="File of your own prompts, mixed in half and half.")] = None,
    redo: Redo = False,
) -> list[dict[str, Any]]:
    """Run or read several methods on one prompt set, and put them into one table, each number with its error."""
    asked = comparing.Asked(names, size, seeds, overrides, tokens, name, model, prompts, redo)
    table, page = comparing.compare(Path(root), asked, _as_sub_flow)
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


def _as_sub_flow(name: str, run: Callable[[], None]) -> None:
    campaign(name, run)
