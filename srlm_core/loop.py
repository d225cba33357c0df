"""The loop, once: bootstrap, iterate, evaluate, report. Executors run its work, observers watch it, the files hold it.

M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import eft, evaluation, frozen_judge, judgments, measuring, prompts, schemas, settings, store, training
from srlm_core.backend import Model
from srlm_core.config import DpoConfig, RunConfig, SftConfig
from srlm_core.data import SetAside
from srlm_core.engines.on_demand import OnDemand
from srlm_core.engines.protocol import Engine
from srlm_core.engines.training_job import TrainingJob, TrainingResult
from srlm_core.errors import NothingLeft
from srlm_core.executor import Pending, Work
from srlm_core.methods import METHODS
from srlm_core.methods.record import Shard, Step
from srlm_core.run import BASELINE, MARKER, Run
from srlm_core.store import Made, digest, materialize, part_path

log = logging.getLogger("srlm")

# --- the whole ------------------------------------------------------------------------------------------------------


def self_reward(run: Run) -> None:
    """Run a campaign to its end, or go on with it: what is finished and unchanged is reused."""
    executor, last = run.executor, run.config.iterations
    executor.flow("bootstrap", "bootstrap", partial(bootstrap, run))
    for t in range(1, last + 1):
        executor.flow("iteration", f"iteration {t}", partial(iterate, run, t))
    executor.flow("evaluate", "evaluate", partial(evaluate_rest, run))
    run.tell("finished", timings=run.timings)


def bootstrap(run: Run) -> None:
    """Train sft_baseline on IFT, and M1 on IFT + EFT, both from M0 (section 2.3)."""
    folder, config, seed = run.campaign.folder / "bootstrap", run.config, run.seed_data
    _forget_seed_data(folder, judged=config.seed_data.eft_is_judged)
    for name, lines in seed.set_aside.items():
        _keep_set_aside(run, name, lines)
    with run.phase("base model"):
        base = run.base
    ift = _seed_rows(folder / "ift.parquet", training.ift_examples(seed.ift))
    _train(run, Lesson(BASELINE, "sft", lambda: [ift], config.training.sft, base, None, folder))
    groups = _judge_eft(run, seed.eft) if config.seed_data.eft_is_judged else seed.eft
    asked = _asked_in_eft(config, groups)
    eft_rows = _seed_rows(folder / "eft.parquet", training.eft_examples(groups, asked, config.seed_data.eft_form))
    _train(run, Lesson("M1", "sft", lambda: [ift, eft_rows], config.training.sft, base, None, folder))


def _forget_seed_data(folder: Path, *, judged: bool) -> None:
    """Drop what other settings left: a report must not tell of rows that this campaign did not see."""
    shutil.rmtree(folder / "set_aside", ignore_errors=True)
    (folder / "eft.json").unlink(missing_ok=True)
    if not judged:
        store.forget_later_parts(folder, "judgments", 0)


def _keep_set_aside(run: Run, name: str, lines: Sequence[SetAside]) -> None:
    path = run.campaign.folder / "bootstrap" / "set_aside" / f"{name}.json"
    store.write_json(path, [{"line": line.line, "reason": line.reason, "text": line.text} for line in lines])
    run.tell("set_aside", file=name, count=len(lines), where=str(path))


def _seed_rows(path: Path, rows: pa.Table) -> pa.Table:
    made_from = digest("seed", path.stem, store.rows_digest([rows], rows.schema))
    stamp = store.stamp_of(path)
    if stamp is None or stamp.fingerprint != made_from:
        store.write_part(path, rows, made_from)
    return rows


def _asked_in_eft(config: RunConfig, groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """Render each judged response as the loop's judge will see it."""
    rubric = judgments.load_rubric(config.judgments.rubric, justified=config.seed_data.eft_form == "justified")
    return {
        (group["prompt"], response["text"]): rubric.ask(prompt=group["prompt"], response=response["text"])
        for group in groups
        for response in group["responses"]
    }


def _judge_eft(run: Run, groups: Sequence[eft.Group]) -> list[eft.Group]:
    """Let a model write the judgments that M1 learns: those that agree with people's ranking (section 3.1.1).

    sft_baseline is measured meanwhile: its engine is open.
    """
    seed, size = run.config.seed_data, run.config.engine.shard_rows
    judge = run.model(seed.eft_endpoint or BASELINE)
    shards = [evaluation.group_tasks(groups[start : start + size]) for start in range(0, len(groups), size)]
    run.tell("shards", stage="judgments", iteration=0, total=len(shards))
    with run.phase("judging for EFT"), run.engines() as lend:
        pending = [_submit_eft(run, judge, lend, shards, number) for number in range(len(shards))]
        everyone = judge.name == BASELINE and run.config.evaluation.models == "all"
        started = measuring.submit(run, judge, lend) if everyone else {}
        parts = [work.result() for work in pending]
        measuring.finish(run, judge, started)
    store.forget_later_parts(run.campaign.folder / "bootstrap", "judgments", len(shards))
    by_id = {task.target_id: (task.prompt, task.response) for work in shards for task in work}
    said: defaultdict[tuple[str, str], list[eft.Said]] = defaultdict(list)
    for part in parts:
        for row in store.read_part(part.path).to_pylist():
            said[by_id[row["target_id"]]].append(eft.Said(row["verdict"], row["text"]))
    targets = eft.targets(groups, said, seed)
    _keep_set_aside(run, "eft_judged", [SetAside(None, why, group["prompt"][:300]) for group, why in targets.set_aside])
    told = {"targets": seed.eft_targets, "judge": judge.name, **targets.counts}
    store.write_json(run.campaign.folder / "bootstrap" / "eft.json", told)
    if not targets.groups:
        raise NothingLeft(
            f"EFT: expected judgments of {judge.name} that agree with people's ranking, got none "
            f"({', '.join(f'{name} {count}' for name, count in targets.counts.items())}). Let a stronger model judge "
            "(seed_data.eft_targets=endpoint), or take the scores of the ranks (eft_targets=ranked, eft_form=score)."
        )
    return targets.groups


def _submit_eft(
    run: Run,
    judge: Model,
    lend: Callable[[Model], OnDemand],
    shards: Sequence[Sequence[judgments.Task]],
    number: int,
) -> Pending[Made]:
    """Start the judgments of one shard of EFT's groups."""
    config, work = run.config, shards[number]
    how = eft.judging(config.seed_data, config.judgments)

    def make(engine: Engine) -> tuple[pa.Table, pa.Table]:
        return judgments.judge(work, engine, how, iteration=0, judge_name=judge.name, seed=config.seed)

    rubric = judgments.load_rubric(how.rubric, justified=True).identity
    what = [judgments.VERSION, how.model_dump(mode="json"), rubric, [list(task) for task in work]]
    folder, name = run.campaign.folder / "bootstrap", f"judgments of EFT {number + 1}/{len(shards)}"
    part = partial(
        measuring.make_part, run, folder, "judgments", judge, lend, make, what, number=number, stage="judgments"
    )
    return run.executor.submit(Work("judgments", name, part))


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
    _train(run, Lesson(f"M{t + 1}", "dpo", partial(_preferences, parts), how, init, reference, folder))
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
    measuring.judge_suites(run)


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
    slices = _slices(run, t)
    for step in method.steps:
        run.tell("shards", stage=step.makes, iteration=t, total=len(slices))
    for number, (wanted, own) in enumerate(slices):
        shard = Shard(
            config=config, iteration=t, number=number, wanted=wanted, own_prompts=own, policy=policy.name,
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


def _slices(run: Run, t: int) -> list[tuple[int, tuple[str, ...]]]:
    """Cut an iteration into shards: (prompts wanted, the user's own among them). Own prompts are used once."""
    config = run.config.prompts
    n_own = round(config.target * config.file_share)
    own = run.seed_data.own_prompts[(t - 1) * n_own : t * n_own]
    if len(own) < n_own:
        run.tell("note", text=f"iteration {t}: {n_own} prompts wanted from {config.file}, {len(own)} are left in it")
    size = run.config.engine.shard_rows
    starts = range(0, config.target, size)
    return [(min(size, config.target - start), tuple(own[start : start + size])) for start in starts]


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
            "slice": [shard.wanted, *shard.own_prompts] if step.in_order else None,
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
    if not counts["prompts"]:
        return "No prompt survived: raise prompts.max_attempts, set prompts.form=completion, or give prompts.file."
    unreadable = sum(count for reason, count in seen.items() if reason.startswith("unreadable"))
    if counts["judgments"] and unreadable == counts["judgments"]:
        return (
            "No judgment could be read: set judgments.reading=guided or expected, "
            "or raise judgments.sampling.max_tokens."
        )
    if not counts["judgments"]:
        return "No response could be judged: raise engine.context or responses.sampling.max_tokens."
    return "No prompt had two scores that differ: raise judgments.k or responses.n, or set judgments.reading=expected."


def _parts_to_train_on(run: Run, t: int, made: Mapping[str, Sequence[Made]]) -> list[Path]:
    dataset = METHODS[run.config.method].trains_on
    parts = [part.path for part in made[dataset]]
    if run.config.training.dpo.data == "cumulative":
        earlier = [path for s in range(1, t) for path in store.parts(run.campaign.iteration(s) / dataset)]
        parts = earlier + parts
    return parts


def _preferences(parts: Sequence[Path]) -> Iterator[pa.Table]:
    return (training.preferences(store.read_part(path)) for path in parts)


def _anchor(run: Run, which: str, policy: Model) -> Model:
    """Return the model that `init_from` or `reference` names: M_t, M1 or M0."""
    return {"previous": policy, "base": run.base}.get(which) or run.model("M1")


# --- training -------------------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """One training run of the campaign: which model comes of what."""

    name: str
    kind: Literal["sft", "dpo"]
    rows: Callable[[], Iterable[pa.Table]]
    """Reads the rows from their beginning, a piece at a time: all of an iteration's need not fit the memory."""
    config: SftConfig | DpoConfig
    init: Model
    reference: Model | None
    folder: Path

    @property
    def schema(self) -> pa.Schema:
        return schemas.EXAMPLES if self.kind == "sft" else schemas.PREFERENCES

    @property
    def work_dir(self) -> Path:
        """Rows, checkpoints and log; the bootstrap trains two models and keeps them apart."""
        training_dir = self.folder / "training"
        return training_dir / self.name if self.folder.name == "bootstrap" else training_dir

    def fingerprint(self, config: RunConfig) -> str:
        """Hash what the trained weights depend on."""
        return digest(
            {
                "version": training.VERSION, "kind": self.kind, "seed": config.seed,
                "rows": store.rows_digest(self.rows(), self.schema),
                "settings": settings.pick(config, (f"training.{self.kind}",)),
                "init": self.init.digest, "reference": self.reference.digest if self.reference else None,
            },
            length=32,
        )  # fmt: skip


def _train(run: Run, lesson: Lesson) -> Model:
    """Train one model, as a piece of work that the executor shows."""
    return run.executor.run(Work("training", f"training {lesson.name}", partial(_find_or_train, run, lesson)))


def _find_or_train(run: Run, lesson: Lesson) -> Model:
    """Train one model, go on from its last checkpoint, or find it made."""
    output, made_from = run.campaign.model(lesson.name), lesson.fingerprint(run.config)
    marker = store.read_json(output / MARKER)
    if marker and marker["fingerprint"] == made_from and run.backend.digest(output) == marker["digest"]:
        return Model(lesson.name, output, marker["digest"])
    with run.phase(f"training {lesson.name}"):
        result = _train_again(run, lesson, made_from)
    trained, reference = Model(lesson.name, output, run.backend.digest(output)), lesson.reference
    store.write_json(
        output / MARKER,
        {
            "fingerprint": made_from, "digest": trained.digest, "kind": lesson.kind, "rows": result.n_rows,
            "init_from": [lesson.init.name, lesson.init.digest],
            "reference": [reference.name, reference.digest] if reference else None,
            "steps": result.steps, "seconds": round(result.seconds, 1),
        },
    )  # fmt: skip
    shutil.rmtree(lesson.work_dir / "checkpoints", ignore_errors=True)
    run.tell("model", model=trained, result=result, kind=lesson.kind)
    return trained


def _train_again(run: Run, lesson: Lesson, made_from: str) -> TrainingResult:
    work_dir = lesson.work_dir
    stamp = store.stamp_of(work_dir / "rows.parquet")
    if stamp is None or stamp.fingerprint != made_from:
        shutil.rmtree(work_dir, ignore_errors=True)  # checkpoints of other rows or settings must not be continued
    kept, held = work_dir / "rows.parquet", work_dir / "heldout.parquet"
    share = lesson.config.heldout_share
    store.write_stream(kept, (training.hold_out(rows, share)[0] for rows in lesson.rows()), lesson.schema, made_from)
    if share:
        aside = (training.hold_out(rows, share)[1] for rows in lesson.rows())
        store.write_stream(held, aside, lesson.schema, made_from)
    job = TrainingJob(
        kind=lesson.kind,
        rows=kept,
        heldout=held if share and pq.read_metadata(held).num_rows else None,
        init_from=lesson.init.path,
        reference=lesson.reference.path if lesson.reference else None,
        output=run.campaign.model(lesson.name),
        work_dir=work_dir,
        settings=lesson.config,
        seed=run.config.seed,
        trust_remote_code=run.config.model.trust_remote_code,
        threads=run.config.engine.threads,
    )
    shutil.rmtree(job.output, ignore_errors=True)
    attempts = len(list(run.campaign.logs.glob(f"training_{lesson.name}_*.log")))
    progress = partial(run.tell, "training", model=lesson.name)
    result = run.backend.train(
        job,
        log=run.campaign.logs / f"training_{lesson.name}_{attempts + 1}.log",
        on_progress=lambda event: progress(progress=event),
    )
    _keep_training_log(result, lesson, made_from)
    return result


def _keep_training_log(result: TrainingResult, lesson: Lesson, made_from: str) -> None:
    """Keep the curve as a table, and the rows that were too long among the drops."""
    folder, name = lesson.folder, lesson.name
    t = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else 0
    columns = sorted({key for row in result.log for key in row})
    curve = pa.table({key: pa.array([row.get(key) for row in result.log]) for key in columns})
    store.write_part(lesson.work_dir / "log.parquet", curve, made_from)
    drops = [
        {"id": row_id, "stage": "training", "reason": reason, "iteration": t, "detail": f"{name}: {n_tokens} tokens"}
        for row_id, reason, n_tokens in result.dropped
    ]
    store.write_part(folder / "drops" / f"part-training-{name}.parquet", schemas.table(drops, schemas.DROPS), made_from)
