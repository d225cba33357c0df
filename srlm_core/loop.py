"""The loop, once: bootstrap, iterate, evaluate, report. Executors run its work, observers watch it, the files hold it.

M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import annotating, frozen_judge, measuring, prompts, schemas, settings, store, training
from srlm_core.backend import Model
from srlm_core.bootstrap import bootstrap
from srlm_core.engines.on_demand import OnDemand
from srlm_core.engines.protocol import Engine
from srlm_core.errors import NothingLeft
from srlm_core.executor import Pending, Work
from srlm_core.lesson import Lesson, teach
from srlm_core.methods import METHODS
from srlm_core.methods.record import Given, Shard, Step
from srlm_core.run import BASELINE, Run
from srlm_core.store import Made, digest, materialize, part_path

# --- the whole ------------------------------------------------------------------------------------------------------


def self_reward(run: Run) -> None:
    """Run a campaign to its end, or go on with it: what is finished and unchanged is reused."""
    executor, last = run.executor, run.config.iterations
    executor.flow("bootstrap", "bootstrap", partial(bootstrap, run))
    for t in range(1, last + 1):
        executor.flow("iteration", f"iteration {t}", partial(iterate, run, t))
    executor.flow("evaluate", "evaluate", partial(evaluate_rest, run))
    run.tell("finished", timings=run.timings)


def iterate(run: Run, t: int) -> None:
    """Iteration t: M_t is evaluated, writes prompts, answers and judges; M_{t+1} is trained on what that made."""
    policy = run.model(f"M{t}")
    with run.phase(f"iteration {t}: sampling and judging"), run.engines() as lend:
        started = measuring.submit(run, policy, lend)
        made = make_datasets(run, t, policy, lend)
        measuring.finish(run, policy, started)
    _require_rows(run, t, made)
    parts = _parts_to_train_on(run, t, made)
    reference = _anchor(run, run.config.training.dpo.reference, policy)
    init = _anchor(run, run.config.training.dpo.init_from, policy)
    folder = run.campaign.iteration(t)
    how = run.config.training.dpo
    with annotating.meanwhile(run, policy):
        teach(run, Lesson(f"M{t + 1}", "dpo", partial(_preferences, parts), how, init, reference, folder))
    run.tell("iteration", t=t)


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


def evaluate_one(run: Run, model: Model, *, judging_only: bool = False) -> dict[str, Any]:
    """Measure one model by itself, or only how it judges, and return its results."""
    with run.phase(f"evaluating {model.name}"), run.engines() as lend:
        measuring.finish(run, model, measuring.submit(run, model, lend, judging_only=judging_only))
    if not judging_only:
        annotating.annotate(run)
    return store.read_json(run.campaign.folder / "evaluation" / model.name / "results.json")


# --- the stages of an iteration -------------------------------------------------------------------------------------


def make_datasets(run: Run, t: int, policy: Model, lend: Callable[[Model], OnDemand]) -> dict[str, list[Made]]:
    """Send every shard through the method's steps. A shard is judged while the next ones are still being sampled."""
    method, config = METHODS[run.config.method], run.config
    roles = {
        "policy": policy,
        "generator": run.role(config.prompts.generator, policy),
        "judge": run.role(config.judgments.judge, policy),
    }
    kept = _kept_before(run, t)
    pending: dict[str, list[Pending[Made]]] = {step.makes: [] for step in method.steps}
    slices = _slices(run, method.given(config, run.seed_data, t))
    for step in method.steps:
        run.tell("shards", stage=step.makes, iteration=t, total=len(slices))
    for number, (wanted, given) in enumerate(slices):
        shard = Shard(
            config=config, iteration=t, number=number, wanted=wanted, given=given, policy=policy.name,
            models={role: model.name for role, model in roles.items()}, engine=_NO_ENGINE, kept=kept,
        )  # fmt: skip
        for step in method.steps:
            model = roles[step.role] if step.role else None
            reads = {name: pending[name][number] for name in step.reads}
            previous = pending[step.makes][-1:] if step.in_order else []
            name = f"{step.makes} {t}.{number + 1}/{len(slices)}"
            make = partial(_make_part, run, step, shard, model, lend, reads, previous)
            pending[step.makes].append(run.executor.submit(Work(step.makes, name, make), [*reads.values(), *previous]))
            if step.in_order:
                _remember(kept, pending[step.makes][-1].result())
    made = {name: [work.result() for work in works] for name, works in pending.items()}
    for name in made:
        store.forget_later_parts(run.campaign.iteration(t), name, len(slices))
    return made


_NO_ENGINE = cast("Engine", None)  # pure table work never looks at it, and a step with a role gets a real one


def _slices(run: Run, given: Given) -> list[tuple[int, tuple[Mapping[str, Any], ...]]]:
    """Cut what an iteration begins with into shards: (prompts wanted, rows given among them)."""
    if given.note:
        run.tell("note", text=given.note)
    size = run.config.engine.shard_rows
    starts = range(0, given.wanted, size)
    return [(min(size, given.wanted - start), tuple(given.rows[start : start + size])) for start in starts]


def _kept_before(run: Run, t: int) -> prompts.Kept:
    """Start the similarity filter with the seeds, what measures, and the prompts of earlier iterations."""
    seed = run.seed_data
    ift = [row["instruction"] for row in seed.ift]
    kept = prompts.Kept.start(ift, seed.measuring, run.config.prompts.max_similarity, shown=seed.demonstrations)
    for earlier in range(1, t):
        for row in store.iter_rows(run.campaign.iteration(earlier) / "prompts"):
            kept.add(schemas.prompt_text(row["messages"]), generated=row["source"] == "self_instruct")
    return kept


def _remember(kept: prompts.Kept, made: Made) -> None:
    # learned from the file, so a reused shard and a fresh one leave the same filter behind
    for row in store.read_part(made.path).to_pylist():
        kept.add(schemas.prompt_text(row["messages"]), generated=row["source"] == "self_instruct")


def _make_part(
    run: Run,
    step: Step,
    shard: Shard,
    model: Model | None,
    lend: Callable[[Model], OnDemand],
    reads: Mapping[str, Pending[Made]],
    previous: Sequence[Pending[Made]],
) -> Made:
    """Make one shard of one dataset, or find it made."""
    folder = run.campaign.iteration(shard.iteration)
    path, drops = part_path(folder / step.makes, shard.number), store.drops_path(folder, step.makes, shard.number)
    inputs = {name: work.result() for name, work in reads.items()}
    made_from = digest(
        {
            "step": step.makes, "version": step.version, "settings": settings.pick(run.config, step.settings),
            "texts": step.texts(run.config), "seed": run.config.seed,
            "iteration": shard.iteration, "shard": shard.number,
            "engine": settings.pick(run.config, settings.ENGINE) if model else None,
            "model": [model.name, model.digest] if model else None,
            "slice": [shard.wanted, *map(dict, shard.given)] if step.takes_given else None,
            "seed_data": run.seed_data.identities if step.in_order else None,
            "inputs": [made.identity for made in inputs.values()],
            "previous": [work.result().identity for work in previous],
        },
        length=32,
    )  # fmt: skip

    def make(present: pa.Table | None) -> tuple[pa.Table, pa.Table]:
        tables = {name: store.read_part(made.path) for name, made in inputs.items()}
        for name in inputs:
            tables[f"drops:{name}"] = store.read_part(store.drops_path(folder, name, shard.number))
        engine = lend(model).stage(step.makes) if model else _NO_ENGINE
        filled = replace(shard, engine=engine, inputs=tables, present=present)
        if not step.in_order:
            return step.run(filled)
        with shard.kept.on_trial():  # what is kept is learnt from the finished file
            return step.run(filled)

    made = materialize(path, made_from, make, drops=drops, passes=step.passes(run.config))
    run.tell("part", stage=step.makes, iteration=shard.iteration, shard=shard.number, path=path, reused=made.reused)
    return made


def _require_rows(run: Run, t: int, made: Mapping[str, Sequence[Made]]) -> None:
    """Stop where an iteration has nothing to train on, saying what was seen and what to change."""
    counts = {name: sum(pq.read_metadata(part.path).num_rows for part in parts) for name, parts in made.items()}
    if counts[METHODS[run.config.method].trains_on]:
        return
    seen: Counter[str] = Counter()
    for path in store.parts(run.campaign.iteration(t) / "drops"):
        seen.update(f"{row['stage']}: {row['reason']}" for row in store.read_part(path).to_pylist())
    for row in store.iter_rows(run.campaign.iteration(t) / "judgments"):
        seen.update([f"unreadable judgment: {row['unreadable_reason']}"] if row["verdict"] is None else [])
    rows = ", ".join(f"{name} {count}" for name, count in counts.items())
    why = ", ".join(f"{reason} ({count})" for reason, count in seen.most_common(6)) or "nothing was dropped"
    raise NothingLeft(
        f"iteration {t}: expected pairs to train M{t + 1} on, got none ({rows}). What was seen: {why}. "
        f"{_remedy(counts, seen)} "
        f"Everything is kept in {run.campaign.iteration(t)}; run again with the change and --redo."
    )


def _remedy(counts: Mapping[str, int], seen: Counter[str]) -> str:
    if not counts.get("prompts"):
        return "No prompt survived: raise prompts.max_attempts, set prompts.form=completion, or give prompts.file."
    unreadable = sum(count for reason, count in seen.items() if reason.startswith("unreadable"))
    judged = counts.get("judgments")
    if judged and unreadable == judged:
        return (
            "No judgment could be read: set judgments.reading=guided or expected, "
            "or raise judgments.sampling.max_tokens."
        )
    if judged is None:
        return "Where responses were cut, raise responses.sampling.max_tokens; else give other data."
    if judged == 0:
        return "No response could be judged: raise engine.context or responses.sampling.max_tokens."
    return "No prompt had two scores that differ: raise judgments.k or responses.n, or set judgments.reading=expected."


def _parts_to_train_on(run: Run, t: int, made: Mapping[str, Sequence[Made]]) -> list[Path]:
    dataset = METHODS[run.config.method].trains_on
    first = {"latest": t, "last_two": t - 1, "cumulative": 1}[run.config.training.dpo.data]
    earlier = range(max(first, 1), t)
    parts = [path for s in earlier for path in store.parts(run.campaign.iteration(s) / dataset)]
    return parts + [part.path for part in made[dataset]]


def _preferences(parts: Sequence[Path]) -> Iterator[pa.Table]:
    return (training.preferences(store.read_part(path)) for path in parts)


def _anchor(run: Run, which: str, policy: Model) -> Model:
    """Return the model that `init_from` or `reference` names: M_t, M1 or M0."""
    return {"previous": policy, "base": run.base}.get(which) or run.model("M1")
