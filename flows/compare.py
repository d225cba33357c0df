"""Campaigns side by side: their tables of iterations, as one Prefect artifact."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from pydantic import Field

from srlm_core import summary
from srlm_core.errors import StoreError


@flow(name="compare")
def compare(
    campaigns: Annotated[list[str], Field(description="Names of campaigns under the root.", min_length=1)],
    root: Annotated[str, Field(description="Folder of all campaigns.")] = "runs",
) -> list[dict[str, Any]]:
    """Put the models of several campaigns into one table, each number with its error and its n."""
    rows = side_by_side([Path(root) / name for name in campaigns])
    create_table_artifact(rows, "comparison", " against ".join(campaigns))
    for name in campaigns:
        text = f"# {name}\n\n{summary.as_markdown(summary.table(Path(root) / name))}\n"
        create_markdown_artifact(text, "comparison-report", name)
    return rows


def side_by_side(folders: list[Path]) -> list[dict[str, Any]]:
    """Return one row per model of each campaign. Raises StoreError where a folder holds none."""
    for folder in folders:
        if not (folder / "config.json").exists():
            raise StoreError(f"expected a campaign in {folder}, there is none. There are others in {folder.parent}.")
    return [{"campaign": folder.name, **row} for folder in folders for row in summary.table(folder)]
