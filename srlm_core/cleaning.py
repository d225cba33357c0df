"""cleaning: what of a campaign may go for its room, and what then cannot be done any more.

Rows, numbers, markers and digests stay, so that a rerun of the campaign makes nothing again. M0 lies elsewhere.
"""

import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from srlm_core import gates, store, weights
from srlm_core.config import RunConfig
from srlm_core.methods import METHODS, method_of
from srlm_core.run import BASELINE, Run
from srlm_core.store import Campaign


class Find(NamedTuple):
    """Something that may go."""

    what: str
    paths: tuple[Path, ...]
    bytes: int
    """Room that its going gives back; a file that has another name elsewhere gives none."""
    then: str
    """What cannot be done any more."""
    model: str | None = None
    """Whose weights they are."""


def needed(config: RunConfig, done: int) -> set[str]:
    """Name the models that are asked after iteration `done`; one iteration more counts, so that it can be added."""
    roles = {"base": "M0"}
    asked: set[str] = set()
    for t in range(done + 1, max(config.iterations, done) + 2):
        at = config.at(t)
        method, how = method_of(at), at.training
        taught = {training.role: training.name(t) for training in method.trainings}
        roles = {
            "policy": f"M{t}", "previous": f"M{t - 1}", "sft": "M1", "base": "M0", **taught,
            "generator": at.prompts.generator, "judge": at.judgments.judge,
        }  # fmt: skip
        named = [step.role for step in method.makes]
        trained = [training for training in method.trainings if not (training.once and done)]  # else it is there
        named += [role for training in trained for role in (training.init_from, training.reference)]
        asked |= {roles.get(roles[role], roles[role]) for role in named if role}  # a judge may be `policy` or `base`
        anchors = how.online if method.learns == "online" else how.dpo
        called = {**roles, "previous": METHODS[config.method].start(t)}
        asked |= {called[anchors.init_from], called[anchors.reference]}
        asked |= {f"M{t}"} | {name for role, name in taught.items() if role == "reward"}
    judges = (config.evaluation.judge, *config.evaluation.more_judges, config.evaluation.suites.annotator)
    return asked | {roles.get(name, name) for name in judges if name}


def droppable(folder: Path, config: RunConfig, done: int, keep: Collection[str] = ()) -> list[str]:
    """Name the models whose weights nothing needs once iteration `done` is over, oldest first.

    Besides what is `needed` those stay that are not measured yet, and the last `training.keep_last` M_t, at least one.
    """
    there = sorted(path.parent.name for path in folder.glob(f"models/*/{weights.MARKER}"))
    there = [name for name in there if weights.files(folder / "models" / name)]
    policies = sorted((int(name[1:]) for name in there if re.fullmatch(r"M\d+", name)), reverse=True)
    stay = needed(config, done) | {f"M{t}" for t in policies[: config.training.keep_last or 1]} | {*keep}
    return [name for name in there if name not in stay and not _is_to_be_measured(folder, config, name)]


def _is_to_be_measured(folder: Path, config: RunConfig, name: str) -> bool:
    """Whether the evaluation has still to ask a model: M_t, or sft_baseline, without results of these weights."""
    measured = {"all": r"M\d+|" + BASELINE, "policy": r"M\d+", "none": r"(?!)"}[config.evaluation.models]
    if not re.fullmatch(measured, name):
        return False
    results = store.read_json(folder / "evaluation" / name / "results.json") or {}
    marker = weights.marker(folder, name) or {}
    return results.get("digest") != marker.get("digest")


def keep_last(run: Run, done: int) -> None:
    """Drop the weights that nothing needs after iteration `done`, if `training.keep_last` says so.

    With a mirror a model waits until its copy is there: it goes after a later iteration, or at the end.
    """
    if run.config.training.keep_last is None:
        return
    for name in droppable(run.campaign.folder, run.config, done, keep=champions(run.campaign.folder)):
        folder = run.campaign.model(name)
        if run.mirror is None or run.mirror.holds(folder):
            weights.drop(folder, f"after iteration {done} (training.keep_last={run.config.training.keep_last})")
            run.tell("note", text=f"the weights of {name} are dropped: nothing later needs them")


def champions(folder: Path) -> set[str]:
    """Name the last model that passed its gates, if there is one: others may serve it."""
    passed = [t for t, asked in gates.read(folder).items() if gates.verdict(asked)]
    return {f"M{max(passed)}"} if passed else set()


# --- by hand --------------------------------------------------------------------------------------------------------


def find(campaign: Campaign, config: RunConfig, keep: Collection[str] = ()) -> list[Find]:
    """Find what may go: the weights that nothing needs, checkpoints of finished trainings, what crashes left."""
    folder = campaign.folder
    done = max((int(path.name[1:]) for path in folder.glob("models/M*") if path.name[1:].isdigit()), default=1) - 1
    kept = {*keep} | champions(folder)
    found = [_weights_of(folder / "models" / name, config) for name in droppable(folder, config, done, kept)]
    found += [Find(*left) for left in _leftovers(campaign)]
    return _measured(found)


def _weights_of(folder: Path, config: RunConfig) -> Find:
    name, copy = folder.name, config.storage.mirror
    back = (
        f"it is fetched from {copy} when it is asked again, if its copy is there"
        if copy
        else "only training it again brings it back"
    )
    then = (
        f"{name} cannot be talked to, exported, measured anew, nor can anything begin from it; {back}. "
        "Its rows, numbers and digest stay."
    )
    return Find(f"weights of {name}", tuple(weights.files(folder)), 0, then, name)


def _leftovers(campaign: Campaign) -> Iterator[tuple[str, tuple[Path, ...], int, str]]:
    folder = campaign.folder
    for checkpoints in sorted(folder.glob("**/training/**/checkpoints")):
        name = _model_of(folder, checkpoints.parent)
        if (folder / "models" / name / weights.MARKER).exists():
            yield f"checkpoints of {name}", (checkpoints,), 0, "nothing: its training is finished"
    for model in sorted(folder.glob("models/[!.]*/")):
        if not (model / weights.MARKER).exists():
            yield f"what a cut training left of {model.name}", (model,), 0, "nothing: it is trained again anyway"
    aside = [*campaign.leftovers(), *campaign.root.glob(f".{campaign.name}.fork")]
    for path in sorted(aside):
        yield f"temporary {path.name}", (path,), 0, "nothing: whoever wrote it is gone"


def _model_of(folder: Path, work_dir: Path) -> str:
    """Name the model that is trained in a folder: see Lesson.work_dir."""
    iteration = re.fullmatch(r"iter_(\d+)", work_dir.parent.name)
    return f"M{int(iteration[1]) + 1}" if iteration and work_dir.name == "training" else work_dir.name


def _measured(found: Iterable[Find]) -> list[Find]:
    """Say of each find how much room it gives back: a file counts with the last of its names that go."""
    found = list(found)
    names: Counter[tuple[int, int]] = Counter()
    measured: list[Find] = []
    for one in found:
        room = 0
        for stat in (file.stat() for path in one.paths for file in _files(path)):
            names[stat.st_dev, stat.st_ino] += 1
            room += stat.st_size if names[stat.st_dev, stat.st_ino] == stat.st_nlink else 0
        measured.append(one._replace(bytes=room))
    return measured


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def delete(folder: Path, found: Iterable[Find]) -> None:
    """Delete what was found; a model keeps its marker, and says what happened to its weights."""
    for one in found:
        if one.model is not None:
            weights.drop(folder / "models" / one.model, "by `srlm clean`")
            continue
        for path in one.paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def as_text(found: Iterable[Find]) -> str:
    """Spell what would go, how much room each takes, and what it costs."""
    found = list(found)
    if not found:
        return "There is nothing to delete: what is there is needed, or is the last model."
    lines = [f"{one.what:<36}{_spelled(one.bytes):>10}  then: {one.then}" for one in found]
    return "\n".join([*lines, f"{'together':<36}{_spelled(sum(one.bytes for one in found)):>10}"])


def _spelled(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
