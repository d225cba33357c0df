"""Commands by which a campaign is left behind: clean, export, and what its model is served with."""

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from flows.looking import folder_of
from srlm_core import cleaning, summary, weights
from srlm_core.backend import make_backend
from srlm_core.cleaning import Find
from srlm_core.config import EngineConfig, RunConfig
from srlm_core.errors import ConfigError, StoreError
from srlm_core.store import Campaign

if TYPE_CHECKING:
    from srlm_core.export import Push  # the hub's library, for which `srlm clean` need not wait


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


def export(
    root: Path, name: str, model: str | None, to: Path | None, *, push: str | None, public: bool, datasets: bool
) -> dict[str, str | list[str]]:
    """Write a campaign's model, and its datasets, with cards; upload them where asked. Returns what is where."""
    from srlm_core import export as exporting

    folder = folder_of(root, name)
    config = config_of(folder)
    going = _checked(push, public=public)
    model = model or _last(folder)
    require_model(folder, model, "--model")
    cache = folder.parent / ".cache" / "models"
    backend = make_backend(config, cache=cache, logs=folder / "logs")
    target = to or folder / "export"
    data_repo = going.data_repo if going and datasets else None
    exported = {
        "model": exporting.export_model(
            folder, config, model, target / model, base=_base_of(config, cache), digest_of=backend.digest,
            data_repo=data_repo,
        )
    }  # fmt: skip
    if datasets:
        exported["dataset"] = exporting.export_datasets(folder, config, target / "datasets")
    told: dict[str, str | list[str]] = {kind: str(path) for kind, path in exported.items()}
    return told | ({"pushed": exporting.push(exported, going)} if going else {})


def _checked(push: str | None, *, public: bool) -> "Push | None":
    from srlm_core import export as exporting

    if push is None:
        return None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise ConfigError(f"--push: expected OWNER/NAME of the hub, got {push!r}.")
    exporting.require_token()
    return exporting.Push(push, public)


def _last(folder: Path) -> str:
    """Name the last M_t whose weights are there."""
    there = [path.parent for path in folder.glob(f"models/M*/{weights.MARKER}") if not weights.are_dropped(path.parent)]
    if not there:
        raise StoreError(f"expected a trained model in {folder / 'models'}, there is none yet. Run the campaign.")
    return max((path.name for path in there if path.name[1:].isdigit()), key=lambda name: int(name[1:]))


def _base_of(config: RunConfig, cache: Path) -> Path | None:
    """Find where M0 lies, without fetching it."""
    if Path(config.model.path).is_dir():
        return Path(config.model.path)
    return next(iter(sorted(cache.glob(f"{config.model.path}-*"))), None) if "/" not in config.model.path else None


def serve_command(model: Path) -> str | None:
    """Say how a model is served to others, by what is installed here; None where nothing is."""
    if (model / "scripted.json").exists():
        return None
    if importlib.util.find_spec("vllm"):
        try:
            distribution("vllm")
        except PackageNotFoundError:  # its build for processors: `vllm serve` looks for the other one's version
            started, more = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model", _on_a_processor()
        else:
            started, more = f"{_script('vllm')} serve", ""
        return f"{started} {model} --served-model-name {model.name} --host 127.0.0.1{more}"
    serving = all(importlib.util.find_spec(package) for package in ("transformers", "fastapi", "uvicorn"))
    return f"{_script('transformers')} serve {model}" if serving else None


def _on_a_processor() -> str:
    """Spare vLLM minutes of compiling, and nearly all of the memory: it takes what an engine of ours would."""
    from srlm_core.engines.tuning import choices

    chosen = {choice.setting: choice.value for choice in choices(EngineConfig(kind="vllm"))}
    if "kv_cache_gib" not in chosen:
        return ""
    return f" --enforce-eager --kv-cache-memory-bytes {int(float(chosen['kv_cache_gib']) * 2**30)}"


def _script(name: str) -> str:
    """Return a command of this environment, by its path where the shell would not find it."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(beside) else str(beside)


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
