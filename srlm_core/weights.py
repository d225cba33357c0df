"""weights: those of a model that was trained here may be dropped for their room; what tells of it stays.

A model's folder then holds its marker, its settings, its tokenizer, and DROPPED, which says what happened.
"""

from pathlib import Path
from typing import Any

from srlm_core import store
from srlm_core.errors import ModelError

MARKER = "complete.json"
"""Written last into a model's folder: where it is, the model is whole, or was."""
DROPPED = "dropped.json"
"""Where it is, the weights are gone on purpose."""


def marker(folder: Path, model: str) -> dict[str, Any] | None:
    """Read what a campaign's folder says of a finished model: its digest, and what it was trained of; None before."""
    return store.read_json(folder / "models" / model / MARKER)


def files(folder: Path) -> list[Path]:
    """List the files that hold a model's weights, with the scripted model's one."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("scripted.json")])


def are_dropped(folder: Path) -> bool:
    """Whether a model's weights were dropped on purpose."""
    return (folder / DROPPED).exists()


def drop(folder: Path, why: str) -> None:
    """Delete a model's weights, and say so beside its marker."""
    found = files(folder)
    if not found:
        return
    told: dict[str, Any] = {"why": why, "files": [path.name for path in found]}
    store.write_json(folder / DROPPED, told)  # first: a crash in between leaves a model that says it may lack weights
    for path in found:
        path.unlink()


def take_back(folder: Path) -> None:
    """Note that a model's weights are there again."""
    (folder / DROPPED).unlink(missing_ok=True)


def require(folder: Path) -> None:
    """Raise ModelError where a model's weights were dropped, saying how to get them back."""
    if not are_dropped(folder):
        return
    why = (store.read_json(folder / DROPPED) or {}).get("why") or "by `srlm clean`"
    raise ModelError(
        f"expected the weights of {folder.name} in {folder}, they were dropped {why}. Its rows and numbers are kept. "
        f"To get it back: run the campaign with the storage.mirror that holds it, or copy its weights here and delete "
        f"{folder / DROPPED}, or delete {folder / MARKER} and run the campaign again, which trains it again from the "
        "rows it was trained on; if it comes out different, so does everything after it."
    )
