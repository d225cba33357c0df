"""export: a model and its datasets in a folder that anybody can load, with cards; and from there to a hub."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from httpx2 import HTTPError  # what the hub's library speaks
from huggingface_hub import HfApi, get_token

from srlm_core import cards, store, summary, weights
from srlm_core.config import RunConfig
from srlm_core.errors import ModelError, StoreError

_OURS = "srlm.json"
"""What the program wrote of an export; a folder without it is somebody else's."""
_KEPT_HERE = {weights.MARKER, weights.DROPPED, "source.json"}


class Push(NamedTuple):
    """Where a model goes, and whether everybody may see it."""

    repo: str
    """OWNER/NAME; the datasets go to OWNER/NAME-data."""
    public: bool = False

    @property
    def data_repo(self) -> str:
        return f"{self.repo}-data"


def export_model(
    folder: Path,
    config: RunConfig,
    model: str,
    target: Path,
    *,
    base: Path | None,
    digest_of: Callable[[Path], str],
    data_repo: str | None = None,
) -> Path:
    """Write a model of a campaign with its card into a folder. Weights are linked where that works.

    Raises ModelError where its weights are not those that its digest names, StoreError where the folder is not ours.
    """
    source = folder / "models" / model
    weights.require(source)
    marker = store.read_json(source / weights.MARKER)
    if (found := digest_of(source)) != marker["digest"]:
        raise ModelError(
            f"expected the weights of {model} with digest {marker['digest']} in {source}, got {found}: they were "
            "changed or damaged. Run the campaign again: it makes what is damaged anew."
        )
    card = cards.model_card(folder, config, model, base, data_repo)

    def fill(aside: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in _KEPT_HERE:
                finished = path.suffix == ".safetensors"
                (store.link_or_copy if finished else shutil.copy2)(path, aside / path.name)
        card.save(aside / "README.md")
        store.write_json(aside / _OURS, {"campaign": folder.name, "lineage": cards.lineage(folder, model)})

    return _write(target, fill)


def export_datasets(folder: Path, config: RunConfig, target: Path) -> Path:
    """Write a campaign's datasets with their card into a folder: a subfolder each, parts linked where that works.

    Raises StoreError where the campaign has made no row yet, or the folder is not ours.
    """
    tables = _tables(folder)
    if not tables:
        raise StoreError(f"expected datasets of an iteration in {folder}, there are none yet. Run the campaign.")
    card = cards.dataset_card(folder, config, tables)

    def fill(aside: Path) -> None:
        for name, parts in tables.items():
            (aside / name).mkdir()
            for t, paths in parts.items():
                for path in paths:
                    store.link_or_copy(path, aside / name / f"iter_{t:02d}-{path.name.removeprefix('part-')}")
        card.save(aside / "README.md")
        store.write_json(
            aside / _OURS, {"campaign": folder.name, "tables": {name: [*of] for name, of in tables.items()}}
        )

    return _write(target, fill)


def _tables(folder: Path) -> dict[str, dict[int, list[Path]]]:
    """List the parts of each dataset by iteration; one without a row is told by its count alone."""
    first = ("prompts", "responses", "judgments", "pairs")
    found: dict[str, dict[int, list[Path]]] = {name: {} for name in first}
    for t in summary.iterations(folder):
        for dataset in sorted(path for path in (folder / f"iter_{t:02d}").iterdir() if path.is_dir()):
            parts = [path for path in store.parts(dataset) if pq.read_metadata(path).num_rows]
            if parts:
                found.setdefault(dataset.name, {})[t] = parts
    return {name: of for name, of in found.items() if of}


def _write(target: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a folder aside, and put it in the place of an earlier export."""
    if target.exists() and not (target / _OURS).exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"expected an empty folder, or an earlier export, at {target}. Name another one with --to.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except OSError as error:
        raise StoreError(f"expected to write {target}, got: {error}. Name another place with --to.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


# --- to a hub -------------------------------------------------------------------------------------------------------


def require_token() -> None:
    """Raise StoreError where nobody is logged in to the hub."""
    if not get_token():
        raise StoreError(
            "--push: expected a token of the hub, got none. Set HF_TOKEN in the environment, or run `hf auth login`."
        )


def push(exported: Mapping[str, Path], to: Push) -> list[str]:
    """Upload what was exported, `model` and `dataset`, and return the addresses. Private unless it says otherwise.

    Raises StoreError, saying what is still in its folder, where the hub cannot be reached or refuses.
    """
    api, done = HfApi(), list[str]()
    for kind, folder in exported.items():
        repo = to.repo if kind == "model" else to.data_repo
        try:
            made = api.create_repo(repo, repo_type=kind, private=not to.public, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id, repo_type=kind, folder_path=folder, commit_message=f"{folder.name}, by srlm"
            )
        except (HTTPError, OSError, ValueError) as error:
            raise StoreError(
                f"--push: expected to upload {folder} to {repo} at {api.endpoint}, got: {_first_line(error)}. Nothing "
                f"is lost: what was exported is in {' and '.join(map(str, exported.values()))}"
                f"{f', of which {done} are uploaded' if done else ''}; the same command tries again."
            ) from error
        done.append(str(made))
    return done


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
