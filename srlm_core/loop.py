"""The loop, once: bootstrap, iterate, evaluate, report. Executors run its work, observers watch it, the files hold it.

M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import annotating, comparisons, counting, frozen_judge, gatekeeper, measuring, store, training
from srlm_core.backend import Model
from srlm_core.bootstrap import bootstrap
from srlm_core.cleaning import keep_last
from srlm_core.config import DpoConfig
from srlm_core.errors import EngineDied, ModelError, NothingLeft, StoreError
from srlm_core.lesson import Lesson, teach
from srlm_core.methods import METHODS
from srlm_core.run import BASELINE, Run
from srlm_core.shards import make_datasets
from srlm_core.store import Made
from srlm_core.weights import MARKER

# --- the whole ------------------------------------------------------------------------------------------------------


def self_reward(run: Run) -> None:
    """Run a campaign to its end, or go on with it: what is finished and unchanged is reused."""
    executor, last = run.executor, run.config.iterations
    _look_for_named(run)
    executor.flow("bootstrap", "bootstrap", partial(bootstrap, run))
    for t in range(1, last + 1):
        executor.flow("iteration", f"iteration {t}", partial(iterate, run, t))
        keep_last(run, t)
        gatekeeper.ask_person(run, t)
    executor.flow("evaluate", "evaluate", partial(evaluate_rest, run))
    keep_last(run, last)
    run.tell("finished", timings=run.timings)


def _look_for_named(run: Run) -> None:
    """Find whom the user names before anything is loaded: reward models, and the endpoints that are asked on the way.

    An endpoint that only measures may still be started: it is told of, and asked when its time comes. A campaign whose
    last model is there asks none of the others any more. Raises ModelError or EngineDied, naming the setting.
    """
    config, method = run.config, METHODS[run.config.method]
    for taught in method.trainings:
        if (named := taught.named(config)) and taught.kind == "reward":
            run.reward_model(named)
    roles = {step.role for step in method.makes}
    asked = {
        "judgments.judge": config.judgments.judge if "judge" in roles else "",
        "prompts.generator": config.prompts.generator if "generator" in roles else "",
        "seed_data.eft_endpoint": config.seed_data.eft_endpoint if method.teaches(config) else "",
    }
    if (run.campaign.model(f"M{config.iterations + 1}") / MARKER).exists():
        asked = {}
    for setting, name in asked.items():
        _greet(run, setting, name or "")
    measuring_ones = (config.evaluation.judge, *config.evaluation.more_judges, config.evaluation.suites.annotator or "")
    for name in () if config.evaluation.models == "none" else measuring_ones:
        try:
            _greet(run, "evaluation", name)
        except (ModelError, EngineDied) as error:
            run.tell("note", text=f"not there yet: {error}")


def _greet(run: Run, setting: str, name: str) -> None:
    """See that an endpoint answers; any other model is looked for elsewhere."""
    if "@http" in name:
        try:
            with run.backend.open(run.backend.frozen(name)):
                pass
        except (ModelError, EngineDied) as error:
            raise type(error)(f"{setting}={name}: {error}") from error


def iterate(run: Run, t: int) -> None:
    """Iteration t: M_t is evaluated, writes prompts, answers and judges; M_{t+1} is trained on what that made."""
    policy = run.model(f"M{t}")
    made = make_datasets(run, t, policy)
    _require_rows(run, t, made)
    gatekeeper.ask_gates(run, t)  # before the training, which is what costs
    lesson = _on_prompts if METHODS[run.config.method].learns == "online" else _on_pairs
    with annotating.meanwhile(run, policy):
        teach(run, lesson(run, t, made))
    run.tell("iteration", t=t)


def _on_pairs(run: Run, t: int, made: Mapping[str, Sequence[Made]]) -> Lesson:
    """Lay out DPO of M_{t+1} on the pairs of iteration t, and on those that are replayed."""
    how = run.config.at(t).training.dpo
    parts = [*_replayed(run, t, how.replay), *_parts_to_train_on(run, t, how.data, made)]
    reference, init = _anchor(run, how.reference, t), _anchor(run, how.init_from, t)
    rows = partial(_preferences, parts, how)
    return Lesson(f"M{t + 1}", "dpo", rows, how, init, reference, run.campaign.iteration(t))


def _on_prompts(run: Run, t: int, made: Mapping[str, Sequence[Made]]) -> Lesson:
    """Lay out the policy gradient of M_{t+1} on the prompts of iteration t."""
    how = run.config.at(t).training.online
    reward = next(taught for taught in METHODS[run.config.method].trainings if taught.kind == "reward")
    named = reward.named(run.config)
    return Lesson(
        f"M{t + 1}", "online", lambda: (training.queries(store.read_part(part.path)) for part in made["prompts"]), how,
        _anchor(run, how.init_from, t), _anchor(run, how.reference, t), run.campaign.iteration(t),
        run.reward_model(named) if named else run.model(reward.name(t)),
    )  # fmt: skip


def evaluate_rest(run: Run) -> None:
    """Evaluate the last model and the two that no iteration opens, and let the frozen judge compare them all."""
    config = run.config.evaluation
    if config.models == "none":
        return
    last = run.model(f"M{run.config.iterations + 1}")
    others = [last] + ([run.model(BASELINE)] if config.models == "all" else [])
    for model in (model for model in others if model.name not in run.measured):
        with run.phase(f"evaluating {model.name}"), run.engines() as lend:
            measuring.finish(run, model, measuring.submit(run, model, lend))
    judge = run.role(config.judge, run.base)
    with run.phase("evaluating M0, head to head"), run.engines() as lend:
        if config.models == "all":
            measuring.finish(run, run.base, measuring.submit(run, run.base, lend))
        frozen_judge.head_to_head(run, judge, lend)
        frozen_judge.place_own_answers(run, judge, lend)
    frozen_judge.other_judges(run)
    annotating.annotate(run)
    gatekeeper.ask_gates(run, run.config.iterations + 1)


def evaluate_one(run: Run, model: Model, *, judging_only: bool = False) -> dict[str, Any]:
    """Measure one model by itself, or only how it judges, and return its results."""
    with run.phase(f"evaluating {model.name}"), run.engines() as lend:
        measuring.finish(run, model, measuring.submit(run, model, lend, judging_only=judging_only))
    if not judging_only:
        annotating.annotate(run)
    return store.read_json(run.campaign.folder / "evaluation" / model.name / "results.json")


# --- between the stages --------------------------------------------------------------------------------------------


def _require_rows(run: Run, t: int, made: Mapping[str, Sequence[Made]]) -> None:
    """Stop where an iteration has nothing to train on, saying what was seen and what to change."""
    counts = {name: sum(pq.read_metadata(part.path).num_rows for part in parts) for name, parts in made.items()}
    needed = METHODS[run.config.method].makes[-1].makes
    if counts[needed]:
        return
    seen: Counter[str] = Counter()
    for path in store.parts(run.campaign.iteration(t) / "drops"):
        seen.update(f"{row['stage']}: {row['reason']}" for row in store.read_part(path).to_pylist())
    for row in store.iter_rows(run.campaign.iteration(t) / "judgments"):
        seen.update([f"unreadable judgment: {row['unreadable_reason']}"] if row["verdict"] is None else [])
    rows = ", ".join(f"{name} {count}" for name, count in counts.items())
    why = ", ".join(f"{reason} ({count})" for reason, count in seen.most_common(6)) or "nothing was dropped"
    raise NothingLeft(
        f"iteration {t}: expected {needed} to train M{t + 1} on, got none ({rows}). What was seen: {why}. "
        f"{_remedy(counts, seen)} "
        f"Everything is kept in {run.campaign.iteration(t)}; run again with the change and --redo."
    )


def _remedy(counts: Mapping[str, int], seen: Counter[str]) -> str:
    if not counts.get("prompts"):
        return "No prompt survived: raise prompts.max_attempts, set prompts.form=completion, or give prompts.file."
    if {reason for reason, _ in seen.most_common(1)} & {"pairs: no_positive", "pairs: margin_too_small"}:
        return "No response was good enough, or led by enough: lower the scores and margins that the method pairs by."
    unreadable = sum(count for reason, count in seen.items() if reason.startswith("unreadable"))
    judged = counts.get("judgments")
    if judged and unreadable == judged:
        return (
            "No judgment could be read: set judgments.reading=guided or expected, "
            "or raise judgments.sampling.max_tokens."
        )
    if judged is None and seen["pairs: tie"]:
        return "All responses of a prompt were worth the same: raise responses.n or responses.sampling.temperature."
    if judged is None and seen["pairs: fewer_than_two_to_compare"]:
        return "No prompt had two responses that ended: raise responses.n or responses.sampling.max_tokens."
    if judged is None:
        return "Where responses were cut, raise responses.sampling.max_tokens; else give other data."
    if judged == 0:
        return "No response could be judged: raise engine.context or responses.sampling.max_tokens."
    return "No prompt had two scores that differ: raise judgments.k or responses.n, or set judgments.reading=expected."


class _Part(NamedTuple):
    """A part of pairs to train on."""

    path: Path
    only: frozenset[str] | None = None
    """The ids of those that are taken; null: all."""


def _parts_to_train_on(run: Run, t: int, data: str, made: Mapping[str, Sequence[Made]]) -> list[_Part]:
    first = {"latest": t, "last_two": t - 1, "cumulative": 1}[data]
    earlier = (run.campaign.iteration(s) / "pairs" for s in range(max(first, 1), t))
    old = [path for folder in earlier for path in store.parts(folder)]
    return [_Part(path) for path in [*old, *(part.path for part in made["pairs"])]]


def _replayed(run: Run, t: int, share: float) -> list[_Part]:
    """Draw what is replayed: `share` of the pairs of t - 1, and half the share with each iteration further back.

    A pair is drawn by its id, over the whole iteration: only ids are in memory. Raises StoreError for a damaged part.
    """
    taken: list[_Part] = []
    for back in range(1, t if share else 1):
        ids = {path: _ids_of_whole(path) for path in _pairs_of(run, t - back)}
        everyone = (pair_id for of in ids.values() for pair_id in of)
        drawn = training.draw(everyone, share / 2 ** (back - 1), run.config.seed, t)
        taken += [_Part(path, drawn) for path in ids]
    return taken


def _pairs_of(run: Run, t: int) -> list[Path]:
    """List the parts of an iteration's pairs, one for each of its prompts' parts. Raises StoreError if one is gone."""
    folder = run.campaign.iteration(t)
    found = store.parts(folder / "pairs")
    gone = {path.name for path in store.parts(folder / "prompts")} - {path.name for path in found}
    if gone or not found:
        raise _cannot_replay(folder / "pairs" / min(gone, default="part-00000.parquet"), "none is there")
    return found


def _ids_of_whole(path: Path) -> list[str]:
    if store.stamp_of(path) is None:
        raise _cannot_replay(path, "it is damaged")
    return counting.read_columns(path, ["pair_id"])["pair_id"].to_pylist()


def _cannot_replay(path: Path, why: str) -> StoreError:
    return StoreError(
        f"training.dpo.replay: expected the pairs of an earlier iteration in {path}, but {why}. Run the same command "
        "again: what is missing is made again, in order; or set training.dpo.replay=0."
    )


def _preferences(parts: Sequence[_Part], how: DpoConfig) -> Iterator[pa.Table]:
    ask = None if how.labelled else comparisons.pairwise().ask
    for path, only in parts:
        pairs = store.read_part(path)
        if only is not None:
            pairs = pairs.filter(pa.array([pair_id in only for pair_id in pairs["pair_id"].to_pylist()], pa.bool_()))
        yield training.preferences(pairs, ask)


def _anchor(run: Run, which: str, t: int) -> Model:
    """Return the model that `init_from` or `reference` names: the one that the method goes on from, M1 or M0."""
    start = METHODS[run.config.method].start(t)
    return {"previous": run.model(start), "base": run.base}.get(which) or run.model("M1")
