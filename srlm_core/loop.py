"""The loop, once: bootstrap, iterate, evaluate, report. Executors run its work, observers watch it, the files hold it.

M0 --SFT on IFT + EFT--> M1 --[prompts, responses, judgments, pairs, DPO]--> M2 --[…]--> M3
"""

import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import answers, eft, evaluation, judgments, prompts, responses, schemas, settings, store, training
from srlm_core.backend import Backend, Model
from srlm_core.config import DpoConfig, RunConfig, SftConfig
from srlm_core.data import SetAside
from srlm_core.engines.on_demand import OnDemand, Usage
from srlm_core.engines.protocol import Engine
from srlm_core.engines.training_job import TrainingJob, TrainingResult
from srlm_core.errors import NothingLeft
from srlm_core.executor import Executor, Pending, Work
from srlm_core.methods import METHODS
from srlm_core.methods.record import Shard, Step
from srlm_core.seed_data import SeedData, load_seed
from srlm_core.store import Campaign, Made, digest, materialize, part_path

log = logging.getLogger("srlm")

BASE, BASELINE = "M0", "sft_baseline"


Observer = Callable[[str, dict[str, Any]], None]
"""Told (what happened, details): part, training, model, iteration, evaluation, engine_start, phase, finished."""


@dataclass
class Run:
    """One campaign being run."""

    config: RunConfig
    campaign: Campaign
    executor: Executor
    backend: Backend
    observers: Sequence[Observer] = ()

    def __post_init__(self) -> None:
        self.timings: dict[str, float] = store.read_json(self.campaign.folder / "timings.json") or {}
        self.usage: dict[str, dict[str, Any]] = store.read_json(self.campaign.folder / "usage.json") or {}

    def tell(self, what: str, **details: Any) -> None:
        """Tell the observers."""
        for observer in self.observers:
            observer(what, details)

    @cached_property
    def base(self) -> Model:
        return self.backend.base()

    @cached_property
    def seed_data(self) -> SeedData:
        return load_seed(self.config)

    def model(self, name: str) -> Model:
        """Return a finished model of this campaign, or another one by path."""
        if name == BASE:
            return self.base
        folder = self.campaign.model(name)
        marker = store.read_json(folder / MARKER)
        if marker is None:
            return self.backend.frozen(name)
        return Model(name, folder, marker["digest"])

    def role(self, name: str, policy: Model) -> Model:
        """Return the model that plays a role: the policy, the base, or another one by path."""
        return {"policy": policy, "base": self.base}.get(name) or self.model(name)

    @contextmanager
    def engines(self) -> Iterator[Callable[[Model], OnDemand]]:
        """Lend engines: one for each model, started when first asked, closed together."""
        open_ones: dict[str, OnDemand] = {}
        with ExitStack() as stack:

            def lend(model: Model) -> OnDemand:
                if model.name not in open_ones:
                    engine = OnDemand(model.name, partial(self.backend.open, model), self._engine_started)
                    open_ones[model.name] = stack.enter_context(engine)
                return open_ones[model.name]

            yield lend
        self._count(open_ones.values())

    def _engine_started(self, model: str, seconds: float) -> None:
        self.add_time("engine starts", seconds)
        with (self.campaign.logs / "engine_starts.txt").open("a") as file:
            file.write(f"{model}\n")
        self.tell("engine_start", model=model, seconds=seconds)

    def _count(self, engines: Iterable[OnDemand]) -> None:
        for engine in engines:
            for stage, used in engine.usage.items():
                total = Usage(**self.usage.get(stage, {}))
                self.usage[stage] = {
                    "requests": total.requests + used.requests,
                    "tokens": total.tokens + used.tokens,
                    "seconds": round(total.seconds + used.seconds, 2),
                }
        store.write_json(self.campaign.folder / "usage.json", self.usage)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; the sum over attempts goes into timings.json."""
        started = time.monotonic()
        self.tell("phase", name=name)
        try:
            yield
        finally:
            self.add_time(name, time.monotonic() - started)

    def add_time(self, name: str, seconds: float) -> None:
        self.timings[name] = round(self.timings.get(name, 0.0) + seconds, 2)
        store.write_json(self.campaign.folder / "timings.json", self.timings)


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
        measuring = _submit_evaluation(run, judge, lend) if everyone else {}
        parts = [work.result() for work in pending]
        _finish_evaluation(run, judge, measuring)
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
    part = partial(_measure, run, folder, "judgments", judge, lend, make, what, number=number, stage="judgments")
    return run.executor.submit(Work("judgments", name, part))


def iterate(run: Run, t: int) -> None:
    """Iteration t: M_t is evaluated, writes prompts, answers and judges; M_{t+1} is trained on what that made."""
    policy = run.model(f"M{t}")
    with run.phase(f"iteration {t}: sampling and judging"), run.engines() as lend:
        measuring = _submit_evaluation(run, policy, lend)
        made = make_datasets(run, t, policy, lend)
        _finish_evaluation(run, policy, measuring)
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
    for model in others:
        with run.phase(f"evaluating {model.name}"), run.engines() as lend:
            _finish_evaluation(run, model, _submit_evaluation(run, model, lend))
    judge = run.role(config.judge, run.base)
    with run.phase("evaluating M0, head to head"), run.engines() as lend:
        if config.models == "all":
            _finish_evaluation(run, run.base, _submit_evaluation(run, run.base, lend))
        _head_to_head(run, judge, lend)


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

MARKER = "complete.json"
"""Written last into a model's folder: where it is, the model is whole."""


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


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluation_prompts(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Lay out evaluation prompts; rows PROMPTS of iteration 0."""
    return schemas.table(
        (
            {
                "prompt_id": digest("evaluation", row["prompt"]),
                "iteration": 0,
                "messages": [{"role": "user", "content": row["prompt"]}],
                "source": "evaluation",
                "generator": "",
            }
            for row in rows
        ),
        schemas.PROMPTS,
    )


def _submit_evaluation(
    run: Run, model: Model, lend: Callable[[Model], OnDemand], *, judging_only: bool = False
) -> dict[str, Pending[Made]]:
    """Start the measurements of one model, so that they share the engine's batch with whatever else it does.

    `judging_only`: the held-out rankings alone.
    """
    if run.config.evaluation.models == "none":
        return {}
    seed, config = run.seed_data, run.config
    asked = evaluation_prompts(seed.evaluation)
    as_text = config.judgments.model_copy(update={"reading": "text", "justified": True, "k": 1})
    tasks = evaluation.group_tasks(seed.heldout)
    few = tasks[: config.evaluation.text_judgments]

    def answer(engine: Engine) -> tuple[pa.Table, pa.Table]:
        return responses.respond(
            asked, engine, config.evaluation.sampling, n=1, iteration=0, model=model.name, seed=config.seed
        )

    def judged(work: Sequence[judgments.Task], how: Any) -> Callable[[Engine], tuple[pa.Table, pa.Table]]:
        return lambda engine: judgments.judge(work, engine, how, iteration=0, judge_name=model.name, seed=config.seed)

    sampling = settings.pick(config, ("evaluation.sampling",))
    pieces: dict[str, tuple[Callable[[Engine], tuple[pa.Table, pa.Table]], Any]] = {
        "responses": (answer, ["responses", responses.VERSION, store.rows_digest([asked], asked.schema), sampling]),
        "heldout": (judged(tasks, config.judgments), _judging(config, tasks)),
        "text": (judged(few, as_text), [_judging(config, few), "text"]),
    }
    if config.evaluation.order_groups:
        played = evaluation.best_against_worst(seed.heldout[: config.evaluation.order_groups])
        pieces["order"] = (
            partial(evaluation.compare, played, judge_name=model.name),
            ["order", judgments.load_rubric("pairwise", justified=None).identity, [list(match) for match in played]],
        )
    if seed.attacks:
        attacks = evaluation.attack_tasks(seed.attacks)
        pieces["attacks"] = (judged(attacks, config.judgments), _judging(config, attacks))
    if judging_only:
        pieces = {"heldout": pieces["heldout"]}
    folder = run.campaign.folder / "evaluation" / model.name
    return {
        name: run.executor.submit(
            Work("evaluation", f"{name} of {model.name}", partial(_measure, run, folder, name, model, lend, make, what))
        )
        for name, (make, what) in pieces.items()
    }


def _judging(config: RunConfig, tasks: Sequence[judgments.Task]) -> list[Any]:
    """What the judgments of these tasks are made from."""
    step = next(step for step in METHODS[config.method].steps if step.makes == "judgments")
    k = config.judgments.k
    return [
        k,
        judgments.VERSION,
        settings.pick(config, step.settings),
        step.texts(config),
        [list(task) for task in tasks],
    ]


def _measure(
    run: Run,
    folder: Path,
    name: str,
    model: Model,
    lend: Callable[[Model], OnDemand],
    make: Callable[[Engine], tuple[pa.Table, pa.Table]],
    what: Any,
    *,
    number: int = 0,
    stage: str = "evaluation",
) -> Made:
    """Make one part of what a model says outside the iterations, or find it made."""
    engine = settings.pick(run.config, settings.ENGINE)
    made_from = digest(
        stage, evaluation.VERSION, name, run.config.seed, model.name, model.digest, engine, what, length=32
    )
    made = materialize(
        part_path(folder / name, number),
        made_from,
        lambda present: make(lend(model).stage(stage)),
        drops=store.drops_path(folder, name, number),
    )
    run.tell("part", stage=stage, iteration=0, shard=number, path=made.path, reused=made.reused)
    return made


def _finish_evaluation(run: Run, model: Model, pending: Mapping[str, Pending[Made]]) -> None:
    """Turn a model's evaluation tables into its results.json."""
    if not pending:
        return
    tables = {name: store.read_part(work.result().path) for name, work in pending.items()}
    config, seed = run.config, run.seed_data

    def mean_scores(name: str) -> dict[str, float]:
        judged = judgments.scores(tables[name], k=config.judgments.k, required=config.judgments.required)
        return {target: score.mean for target, score in judged.items()}

    groups = evaluation.ranked(seed.heldout, mean_scores("heldout"))
    lengths = {task.target_id: len(task.response) for task in evaluation.group_tasks(seed.heldout)}
    results: dict[str, Any] = {
        "model": model.name,
        "digest": model.digest,
        "judge": evaluation.measure_judge(groups, samples=config.evaluation.bootstrap_samples, seed=config.seed),
        "judge_health": evaluation.judge_health(tables["heldout"], lengths),
    }
    if "text" in tables:
        results["text_reading"] = evaluation.judge_health(tables["text"])
    if "responses" in tables:
        results["responses"] = answers.describe(tables["responses"])
    if "order" in tables:
        results["order"] = evaluation.pull_of_order(tables["order"])
    if "attacks" in tables:
        results["attacks"] = evaluation.attack_shift(seed.attacks, mean_scores("attacks"))
    store.write_json(run.campaign.folder / "evaluation" / model.name / "results.json", results)
    run.tell("evaluation", model=model.name, results=results)


def evaluate_one(run: Run, model: Model, *, judging_only: bool = False) -> dict[str, Any]:
    """Measure one model by itself, or only how it judges, and return its results."""
    with run.phase(f"evaluating {model.name}"), run.engines() as lend:
        _finish_evaluation(run, model, _submit_evaluation(run, model, lend, judging_only=judging_only))
    return store.read_json(run.campaign.folder / "evaluation" / model.name / "results.json")


def _head_to_head(run: Run, judge: Model, lend: Callable[[Model], OnDemand]) -> None:
    """Let the frozen judge compare the models' answers to the evaluation prompts, in both orders."""
    folder = run.campaign.folder / "evaluation"
    asked = evaluation_prompts(run.seed_data.evaluation)
    answered = {path.parent.parent.name: path for path in folder.glob("*/responses/part-00000.parquet")}
    pending: dict[str, tuple[Pending[Made], dict[str, int]]] = {}
    for newer, older in head_to_heads(run.config, set(answered)):
        a, b = store.read_part(answered[newer]), store.read_part(answered[older])
        played = evaluation.matches(asked, a, b)
        name = f"{newer}_vs_{older}"
        compare = partial(evaluation.compare, played, judge_name=judge.name)
        what = ["head to head", evaluation.VERSION, [list(match) for match in played]]
        work = partial(_measure, run, folder / "head_to_head", name, judge, lend, compare, what)
        lengths = {row["response_id"]: len(row["response"]) for row in a.to_pylist() + b.to_pylist()}
        pending[name] = run.executor.submit(Work("evaluation", name.replace("_", " "), work)), lengths
    results = {
        name: evaluation.tally(store.read_part(work.result().path), lengths)
        for name, (work, lengths) in pending.items()
    }
    if results:
        digests = {name: run.model(name).digest for name in answered}
        told = {"judge": judge.name, "judge_digest": judge.digest, "digests": digests, "comparisons": results}
        store.write_json(folder / "head_to_head" / "results.json", told)
        run.tell("evaluation", model="head_to_head", results=results)


def head_to_heads(config: RunConfig, answered: set[str]) -> list[tuple[str, str]]:
    """List the comparisons (newer, older) that the settings ask for, each once, among models that answered."""
    policies = [f"M{t}" for t in range(1, config.iterations + 2)]
    wanted: list[tuple[str, str]] = []
    for opponent in config.evaluation.head_to_head:
        if opponent == "chain":
            wanted += zip(policies[1:], policies, strict=False)
        else:
            wanted += [(policy, opponent) for policy in policies if policy != opponent]
    return [pair for pair in dict.fromkeys(wanted) if answered.issuperset(pair)]
