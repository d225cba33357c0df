"""Campaigns side by side: a page, and their tables of models as Prefect artifacts."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from pydantic import Field

from flows.looking import compared
from srlm_core import table


@flow(name="compare")
def compare(
    campaigns: Annotated[list[str], Field(description="Names of campaigns under the root.", min_length=2)],
    root: Annotated[str, Field(description="Folder of all campaigns.")] = "runs",
) -> list[dict[str, Any]]:
    """Put the models of several campaigns into one table and one page, each number with its error and its n."""
    rows, page = compared(Path(root), campaigns)
    create_table_artifact(rows, "comparison", " against ".join(campaigns))
    create_markdown_artifact(f"{table.as_markdown(rows)}\n\n{page}\n", "comparison-report", " against ".join(campaigns))
    return rows
