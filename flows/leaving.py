"""Commands by which a campaign is left behind: clean and export."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.looking import folder_of
from srlm_core import cleaning, summary
from srlm_core.cleaning import Find
from srlm_core.config import RunConfig
from srlm_core.errors import StoreError
from srlm_core.store import Campaign


@contextmanager
def to_clean(root: Path, name: str, keep: Sequence[str]) -> Iterator[tuple[Path, list[Find]]]:
    """Find what of a campaign may go, and hold its lock meanwhile. Raises StoreError where it is being worked on."""
    folder = folder_of(root, name)
    for model in keep:
        require_model(folder, model, "--keep")
    campaign = Campaign(folder.parent, folder.name)
    campaign.take()
    try:
        yield folder, cleaning.find(campaign, config_of(folder), keep)
    finally:
        campaign.__exit__()


def config_of(folder: Path) -> RunConfig:
    """Read a campaign's settings. Raises StoreError where they cannot be read."""
    config = summary.campaign_config(folder)
    if config is None:
        raise StoreError(
            f"expected the settings of a campaign of this version in {folder / 'config.json'}, they cannot be read. "
            "Run the campaign again with this version, or name another one."
        )
    return config


def require_model(folder: Path, model: str, option: str) -> None:
    """Raise StoreError where a campaign has no such model, naming those it has."""
    there = sorted(path.parent.name for path in folder.glob("models/*/complete.json"))
    if model not in there:
        names = f"There are: {', '.join(there)}." if there else "It has none yet: run it."
        raise StoreError(f"{option}: expected a model of {folder.name}, got {model!r}. {names}")
