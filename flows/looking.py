"""Commands that look and do not run: plan, doctor, chat, and finding a campaign's folder."""

import difflib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srlm_core import layout
from srlm_core.config import DEMO_MODEL, EngineConfig, RunConfig
from srlm_core.errors import ConfigError, StoreError
from srlm_core.layout import Line
from srlm_core.methods import METHODS, require_fit
from srlm_core.plan import of_layout, of_this_machine, plan
from srlm_core.seed_data import SeedData, load_seed

DEMO_PARAMETERS, DEMO_BYTES = 134_515_008, 538_060_032


def folder_of(root: Path, campaign: str) -> Path:
    """Find a campaign by name under the root, or by path. Raises StoreError, naming the near ones."""
    for folder in (root / campaign, Path(campaign)):
        if (folder / "config.json").is_file():
            return folder
    there = sorted(path.parent.name for path in root.glob("*/config.json"))
    near = difflib.get_close_matches(campaign, there, n=3, cutoff=0.5) or there[:5]
    hint = f"There are: {', '.join(near)}." if near else "There is none yet: `srlm run smoke` makes one in a minute."
    raise StoreError(f"expected a campaign {campaign!r} in {root.resolve()}. {hint}")


def simulated(flaws: Sequence[str], seeds: int, out: Path) -> tuple[Any, Path]:
    """Simulate campaigns on a judge of known flaws (none named: all); what came of them, and the page of it.

    Raises ConfigError for an unknown flaw, StoreError where the page cannot be written.
    """
    from srlm_core import simulation, simulation_report

    for flaw in flaws:
        if flaw not in simulation.FLAWS:
            raise ConfigError(f"expected a flaw of {', '.join(simulation.FLAWS)}, got {flaw!r}. Name one of them.")
    if out.is_file() or (out / "config.json").exists():
        what = "file" if out.is_file() else "campaign"
        raise StoreError(f"expected a folder for the page, got the {what} {out}. Name another one with --out.")
    wanted = [flaw for flaw in simulation.FLAWS if flaw in flaws or not flaws]
    began = time.monotonic()

    def say(seed: int) -> None:
        left = (time.monotonic() - began) / (seed + 1) * (seeds - seed - 1)
        if (seed + 1) % max(1, seeds // 8) == 0:
            print(f"seed {seed + 1} of {seeds}, {left:.0f} s left", file=sys.stderr)

    rows = simulation.simulate(simulation.cases(wanted, simulation_report.PROBES), seeds, say)
    return simulation_report.Ends(rows), simulation_report.write(rows, seeds, out)


class Cluster(NamedTuple):
    """What `srlm plan` is told of the machines."""

    gpus: int = 0
    """0 = this machine's cores."""
    per_node: int = 8
    sampling_rate: float | None = None
    """Tokens a second that one GPU generates, measured; null = a stated rate."""
    training_rate: float | None = None
    """Tokens a second that one GPU learns in SFT, measured."""


def planned(config: RunConfig, root: Path, cluster: Cluster, parameters: int | None = None) -> list[Line]:
    """Plan a campaign from its config and the model's files, or from how many parameters it has, loading nothing.

    Raises ConfigError for settings that the method cannot work with.
    """
    from srlm_core.engines import models

    require_fit(config)
    if parameters:
        size = 2 * parameters
    elif config.engine.kind == "scripted":
        parameters, size = 1, 1
    elif config.model.path == DEMO_MODEL:
        parameters, size = DEMO_PARAMETERS, DEMO_BYTES
    else:
        found = models.describe(
            models.resolve_model(config.model.path, config.model.revision, root / ".cache" / "models")
        )
        parameters, size = found.parameters, found.weight_bytes
    seed = seed_of(config)
    rows = {
        "ift": len(seed.ift),
        "eft": taught_rows(config, seed),
        "evaluation": len(seed.evaluation),
        "heldout": sum(len(group["responses"]) for group in seed.heldout),
    }
    prompts = prompts_of(config, seed)
    if not cluster.gpus:
        return plan(config, parameters, size, of_this_machine(os.cpu_count() or 1), rows, prompts)
    laid = layout.lay(config, cluster.gpus, cluster.per_node)
    rates = cluster.sampling_rate, cluster.training_rate
    machine = of_layout(laid, config.engine.tensor_parallel, parameters, *rates)
    spelled = layout.lines(config, laid, cluster.gpus, parameters, size, prompts)
    return plan(config, parameters, size, machine, rows, prompts) + spelled


def seed_of(config: RunConfig) -> SeedData:
    """Read the seed data as the method takes it."""
    return load_seed(config, teaches_judging=METHODS[config.method].teaches(config))


def taught_rows(config: RunConfig, seed: SeedData) -> int:
    """Count the judgments that M1 may be taught: of responses, or of two in both orders."""
    if config.seed_data.eft_targets != "self_taught":
        return sum(len(group["responses"]) for group in seed.eft)
    return 2 * min(len(seed.ift), config.seed_data.eft_groups or len(seed.ift))


def prompts_of(config: RunConfig, seed: SeedData) -> list[int]:
    """Say how many prompts each iteration is to hold."""
    given = METHODS[config.method].given
    return [given(config.at(t), seed, t).wanted for t in range(1, config.iterations + 1)]


class Finding(NamedTuple):
    """One thing the doctor looked at."""

    what: str
    ok: bool
    needed: bool
    found: str
    remedy: str = ""


def examine(root: Path) -> list[Finding]:
    """Look at Python, packages, processor, memory, disk and GPU; loads no model."""
    import psutil

    from srlm_core.engines import resolve_dtype, resolve_kind, why_kind
    from srlm_core.engines.tuning import choices

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(_existing(root))
    broken = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    kind = resolve_kind(EngineConfig())
    modern, clash = sys.version_info >= (3, 11), bool(broken) and not _cuda()
    roomy, spacious = memory.available > 6e9, disk.free > 6.5e9
    mend = f"pip uninstall {' '.join(broken)}: beside a CPU torch they break vllm" if clash else ""
    memory_left = f"{memory.available / 2**30:.0f} GiB free of {memory.total / 2**30:.0f}"
    disk_left = f"{disk.free / 2**30:.0f} GiB free"
    packages = {"torch": True, "transformers": True, "trl": True, "vllm": False, "prefect": False, "mlflow": False}
    return [
        Finding("python", modern, True, sys.version.split()[0], "" if modern else "use 3.11 or newer"),
        *(_package(name, needed) for name, needed in packages.items()),
        Finding("torchvision", not clash, True, ", ".join(broken) or "absent, as it should be", mend),
        Finding("engine", True, True, f"{kind}, {resolve_dtype(EngineConfig(kind=kind))}: {why_kind()}"),
        *(
            Finding(f"engine.{choice.setting}", True, False, f"{choice.value}: {choice.why}")
            for choice in choices(EngineConfig(kind=kind))
        ),
        Finding("memory", roomy, True, memory_left, "" if roomy else "the demo needs 6 GiB"),
        Finding("disk", spacious, True, disk_left, "" if spacious else "the demo needs 6 GiB"),
        Finding("cores", (os.cpu_count() or 1) >= 2, False, str(os.cpu_count())),
    ]


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _package(name: str, needed: bool) -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    if importlib.util.find_spec(name) is None:
        why = "make demo installs it, or pip install -e '.[gpu]'" if needed else "the campaign runs without it"
        return Finding(name, False, needed, "not installed", why)
    for package in (name, f"{name}-cpu"):
        try:
            return Finding(name, True, needed, version(package))
        except PackageNotFoundError:
            continue
    return Finding(name, True, needed, "installed")


def _cuda() -> bool:
    return shutil.which("nvidia-smi") is not None


def talk(model: str) -> None:
    """Answer lines from the terminal with a model, keeping the conversation."""
    from srlm_core.engines import open_engine, scripted
    from srlm_core.engines.models import resolve_model
    from srlm_core.engines.protocol import Message, Request, Sampling

    path = Path(model)
    if (path / "scripted.json").exists():
        engine = scripted.ScriptedEngine(EngineConfig(kind="scripted", context=2048), path)
    else:
        path = resolve_model(model, None, Path("runs/.cache/models"))
        engine = open_engine(EngineConfig(kind="transformers", context=2048), path, log=Path("runs/chat.log"))
    said: list[Message] = []
    with engine:
        while line := _asked():
            said.append({"role": "user", "content": line})
            request = Request("chat", messages=tuple(said), sampling=Sampling(max_tokens=400), seed=len(said))
            answer = next(iter(engine.generate([request])))
            if answer.finish_reason == "too_long":
                sys.stdout.write("(the conversation is longer than the context; starting afresh)\n")
                said.clear()
                continue
            said.append({"role": "assistant", "content": answer.text})
            sys.stdout.write(f"{path.name}: {answer.text}\n")


def _asked() -> str:
    try:
        return input("you: ").strip()
    except EOFError:
        return ""
