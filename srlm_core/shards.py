"""shards: the datasets of one iteration, made step by step, a shard at a time, one local model after the other."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa

from srlm_core import measuring, prompts, schemas, settings, store
from srlm_core.backend import Model
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Engine
from srlm_core.executor import Pending, Work
from srlm_core.lesson import Lesson, teach
from srlm_core.measuring import Lend
from srlm_core.methods import method_of
from srlm_core.methods.record import Given, Shard, Step, Training
from srlm_core.run import Run
from srlm_core.store import Fresh, Made, digest, materialize, part_path

REWARD = "reward"
"""Role and kind of the model that rewards responses."""
_NO_ENGINE = cast("Engine", None)  # pure table work never looks at it, and a step with a role gets a real one

Parts = dict[str, list[Pending[Made]]]
"""Dataset to its parts, in shard order."""


class Turn(NamedTuple):
    """Steps that follow one another and ask one local model at most: its engine is open meanwhile, and no other."""

    model: Model | None
    steps: list[Step]


def turns(steps: Iterable[Step], roles: Mapping[str, Model]) -> list[Turn]:
    """Cut steps where another local model is needed; what somebody else serves takes no memory here."""
    found = [Turn(None, [])]
    for step in steps:
        asked = roles[step.role] if step.role else None
        local = None if asked is None or asked.served else asked
        now = found[-1].model
        if local is None or now is None or local.name == now.name:
            found[-1] = Turn(now or local, [*found[-1].steps, step])
        else:
            found.append(Turn(local, [step]))
    return found


def make_datasets(run: Run, t: int, policy: Model) -> dict[str, list[Made]]:
    """Send every shard through the method's steps, and measure M_t while its engine is open.

    A shard is judged while the next ones are still being sampled; only another local model waits for its turn, and
    what a model is taught on the way waits for all that it learns from.
    """
    config = run.config.at(t)
    method = method_of(config)
    roles = _roles(run, config, t, policy)
    kept = _kept_before(run, t)
    shards = [
        Shard(
            config=config, iteration=t, number=number, wanted=wanted, given=given, policy=policy.name, kept=kept,
            models={role: model.name for role, model in roles.items()}, engine=_NO_ENGINE,
        )
        for number, (wanted, given) in enumerate(_slices(run, method.given(config, run.seed_data, t)))
    ]  # fmt: skip
    for step in method.makes:
        run.tell("shards", stage=step.makes, iteration=t, total=1 if step.gathers else len(shards))
    made: Parts = {step.makes: [] for step in method.makes}
    for training, steps in _between_trainings(method.steps):
        if training is not None:
            taught = roles[training.role] = _find_or_train(run, training, roles, t, made)
            shards = [replace(shard, models={**shard.models, training.role: taught.name}) for shard in shards]
        for turn in turns(steps, roles):
            _take(run, t, turn, roles, shards, made)
    for model in _to_be_measured(run, roles):  # a method may never ask it: it is measured all the same
        _take(run, t, Turn(model, []), roles, shards, made)
    done = {name: [work.result() for work in parts] for name, parts in made.items()}
    folder = run.campaign.iteration(t)
    for name, parts in done.items():
        store.forget_later_parts(folder, name, len(parts))
    store.forget_datasets(folder, keep={*done, "drops", "training"})
    own = method.measures({name: _Whole(parts) for name, parts in done.items()}, config)
    told = {name: {"label": measure.label, **measure.rate._asdict()} for name, measure in own.items()}
    store.write_json(folder / "measures.json", told)
    return done


def _between_trainings(steps: Sequence[Step | Training]) -> Iterator[tuple[Training | None, list[Step]]]:
    """Yield each training with the steps that come after it, before the next one; None for the beginning."""
    training, after = None, list[Step]()
    for step in steps:
        if isinstance(step, Step):
            after.append(step)
        else:
            yield training, after
            training, after = step, []
    yield training, after


def _to_be_measured(run: Run, roles: Mapping[str, Model]) -> list[Model]:
    """List M_t, and who rewards its responses, unless they are measured."""
    policy, reward = roles["policy"], roles.get(REWARD)
    due = [] if policy.name in run.measured else [policy]
    return due if reward is None or run.reward_is_measured else [*due, reward]


def _take(run: Run, t: int, turn: Turn, roles: Mapping[str, Model], shards: Sequence[Shard], made: Parts) -> None:
    """Do the steps of a turn with one engine open, to their end."""
    with run.phase(f"iteration {t}: sampling and judging"), run.engines() as lend:
        model, started = turn.model, None
        if model is not None and model in _to_be_measured(run, roles):
            submit = measuring.submit_rewards if model == roles.get(REWARD) else measuring.submit
            started = submit(run, model, lend)
        _send(run, turn.steps, roles, shards, lend, made)
        for step in turn.steps:
            for work in made[step.makes]:
                work.result()
        if model is not None and started is not None:
            measuring.finish(run, model, started)


def _find_or_train(run: Run, training: Training, roles: Mapping[str, Model], t: int, made: Parts) -> Model:
    """Train a model that later steps ask, on all that was made of what it reads, or find the one the user names."""
    if named := training.named(run.config):
        return run.reward_model(named) if training.kind == REWARD else run.role(named, roles["policy"])
    whole = {name: _Whole([work.result() for work in made[name]]) for name in training.reads}
    config = run.config.at(t)
    how = getattr(config.training, training.kind)
    init = roles[training.init_from]
    reference = roles[training.reference or training.init_from] if training.kind == "dpo" else None
    folder = run.campaign.folder / "bootstrap" if training.once else run.campaign.iteration(t)
    rows = partial(training.rows, config, run.seed_data, whole)
    return teach(run, Lesson(training.name(t), training.kind, rows, how, init, reference, folder))


def _roles(run: Run, config: RunConfig, t: int, policy: Model) -> dict[str, Model]:
    return {
        "policy": policy,
        "generator": run.role(config.prompts.generator, policy),
        "judge": run.role(config.judgments.judge, policy),
        "previous": run.model(f"M{t - 1}"),
        "sft": run.model("M1"),
        "base": run.base,
    }


def _slices(run: Run, given: Given) -> list[tuple[int, tuple[Mapping[str, Any], ...]]]:
    """Cut what an iteration begins with into shards: (prompts wanted, rows given among them)."""
    if given.note:
        run.tell("note", text=given.note)
    size = run.config.engine.shard_rows
    starts = range(0, given.wanted, size)
    return [(min(size, given.wanted - start), tuple(given.rows[start : start + size])) for start in starts]


def _send(
    run: Run, steps: Sequence[Step], roles: Mapping[str, Model], shards: Sequence[Shard], lend: Lend, made: Parts
) -> None:
    """Submit steps: shard by shard as far as none gathers, so that a shard goes through them while others wait."""
    for gathers, group in itertools.groupby(steps, key=lambda step: step.gathers):
        together = list(group)
        for shard in shards[:1] if gathers else shards:
            for step in together:
                _submit(run, step, roles, shard, len(shards), lend, made)


def _submit(
    run: Run, step: Step, roles: Mapping[str, Model], shard: Shard, total: int, lend: Lend, made: Parts
) -> None:
    """Submit one shard of one step, or the one part of a step that gathers."""
    model, parts = roles[step.role] if step.role else None, made[step.makes]
    reads = {name: made[name] if step.gathers else [_of_shard(made[name], shard)] for name in step.reads}
    previous = parts[-1:] if step.in_order else []
    number = "" if step.gathers else f".{shard.number + 1}/{total}"
    make = partial(_make_part, run, step, shard, model, lend, reads, previous)
    work = Work(step.makes, f"{step.makes} {shard.iteration}{number}", make)
    parts.append(run.executor.submit(work, [*itertools.chain(*reads.values()), *previous]))
    if step.in_order:
        _remember(shard.kept, parts[-1].result())


def _of_shard(parts: Sequence[Pending[Made]], shard: Shard) -> Pending[Made]:
    """Return a shard's part, or the only one of a dataset that was gathered."""
    return parts[min(shard.number, len(parts) - 1)]


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
    lend: Lend,
    reads: Mapping[str, Sequence[Pending[Made]]],
    previous: Sequence[Pending[Made]],
) -> Made:
    """Make one part of one dataset, or find it made."""
    folder, config = run.campaign.iteration(shard.iteration), shard.config
    path, drops = part_path(folder / step.makes, shard.number), store.drops_path(folder, step.makes, shard.number)
    inputs = {name: [work.result() for work in works] for name, works in reads.items()}
    made_from = digest(
        {
            "step": step.makes, "version": step.version, "settings": settings.pick(config, step.settings),
            "texts": step.texts(config), "seed": config.seed,
            "iteration": shard.iteration, "shard": shard.number,
            "engine": settings.pick(config, settings.ENGINE) if model else None,
            "model": [model.name, model.digest] if model else None,
            "slice": [shard.wanted, *map(dict, shard.given)] if step.takes_given else None,
            "seed_data": run.seed_data.identities if step.in_order else None,
            "inputs": [made.identity for parts in inputs.values() for made in parts],
            "previous": [work.result().identity for work in previous],
        },
        length=32,
    )  # fmt: skip

    def make(present: pa.Table | None) -> Fresh:
        engine = lend(model).stage(step.makes) if model else None
        filled = replace(_with_inputs(shard, step, folder, inputs), engine=engine or _NO_ENGINE, present=present)
        # what is kept is learnt from the finished file
        with shard.kept.on_trial() if step.in_order else nullcontext():
            rows, left_out = step.run(filled)
        return Fresh(rows, left_out, engine.tokens if engine else 0)

    elsewhere = run.campaign.elsewhere(path, drops)
    made = materialize(
        path, made_from, make, drops=drops, passes=step.passes(config), elsewhere=elsewhere, fetch=run.fetch
    )
    run.tell("part", stage=step.makes, iteration=shard.iteration, shard=shard.number, path=path, reused=made.reused)
    return made


def _with_inputs(shard: Shard, step: Step, folder: Path, inputs: Mapping[str, Sequence[Made]]) -> Shard:
    if step.gathers:
        return replace(shard, whole={name: _Whole(parts) for name, parts in inputs.items()})
    tables = {name: store.read_part(part.path) for name, (part,) in inputs.items()}
    for name in inputs:
        drops = store.drops_path(folder, name, shard.number)
        tables[f"drops:{name}"] = store.read_part(drops) if drops.exists() else schemas.DROPS.empty_table()
    return replace(shard, inputs=tables)


class _Whole(NamedTuple):
    """A dataset of an iteration, read a part at a time, as often as somebody asks."""

    parts: Sequence[Made]

    def __iter__(self) -> Iterator[pa.Table]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (store.read_part(part.path) for part in self.parts)
