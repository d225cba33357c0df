"""approval: what a person decided between two iterations, kept in the campaign's folder: nobody is asked twice."""

from datetime import UTC, datetime
from pathlib import Path

from srlm_core import store, weights
from srlm_core.errors import StoreError
from srlm_core.summary import campaign_config


def path_of(folder: Path, t: int) -> Path:
    """Where the decision after iteration t lies."""
    return folder / f"iter_{t:02d}" / "approval.json"


def read(folder: Path, t: int) -> bool | None:
    """Whether to go on after iteration t; None where nobody has decided, or M_t+1 was trained again since."""
    kept = store.read_json(path_of(folder, t))
    return kept["go_on"] if kept is not None and kept["digest"] == _digest(folder, t + 1) else None


def keep(folder: Path, t: int, *, go_on: bool) -> None:
    """Write a decision down, in the place of an earlier one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    store.write_json(path_of(folder, t), {"go_on": go_on, "digest": _digest(folder, t + 1), "decided": now})


def decide(folder: Path, *, go_on: bool) -> int:
    """Decide on the iteration that finished last, and return it. Raises StoreError where none waits."""
    config = campaign_config(folder)
    last = config.iterations if config else 0
    t = max((t for t in range(1, last + 1) if _digest(folder, t + 1)), default=0)
    if not 0 < t < last:
        what = "no iteration has finished yet" if t == 0 else f"M{t + 1} is its last model"
        raise StoreError(
            f"expected a campaign between two iterations in {folder}, but {what}: there is nothing to decide. "
            "A campaign is extended by running it with a larger `iterations`."
        )
    keep(folder, t, go_on=go_on)
    return t


def _digest(folder: Path, number: int) -> str | None:
    return (weights.marker(folder, f"M{number}") or {}).get("digest")
