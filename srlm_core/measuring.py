"""measuring: what the loop measures of each model, made part by part through the engine that is open for it.

evaluation.py says what the numbers mean; this says what is asked, when, and where it is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import (
    answers,
    comparisons,
    evaluation,
    judgments,
    own_answers,
    responses,
    rewards,
    schemas,
    settings,
    store,
)  # fmt: skip
from srlm_core.backend import Model
from srlm_core.config import JudgmentsConfig, RunConfig, SamplingConfig
from srlm_core.engines.on_demand import OnDemand
from srlm_core.engines.protocol import Engine
from srlm_core.executor import Pending, Work
from srlm_core.run import Run
from srlm_core.store import Fresh, Made, digest, materialize, part_path
from srlm_core.suites import Taken, capability, record
from srlm_core.suites.record import Item, Tables

Make = Callable[[Engine], Tables]
Piece = tuple[Make, Any]
"""How a part is made, and what it is made from."""
Lend = Callable[[Model], OnDemand]
"""Lends the engine of a model, started when it is first asked."""
REFUSAL_TOKENS = 48
"""Tokens of an answer that is only looked at for a refusal."""
Started = Mapping[str, Sequence[Pending[Made]]]
"""The parts that are being made of a model's measurements, by name."""


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


def submit(run: Run, model: Model, lend: Lend, *, judging_only: bool = False) -> Started:
    """Start the measurements of one model, so that they share the engine's batch with whatever else it does.

    `judging_only`: the held-out rankings alone.
    """
    if run.config.evaluation.models == "none":
        return {}
    _keep_prompts(run, evaluation_prompts(run.seed_data.evaluation))
    folder = run.campaign.folder / "evaluation" / model.name
    started: dict[str, list[Pending[Made]]] = {}
    for name, shards in _pieces(run, model, judging_only=judging_only).items():
        store.forget_later_parts(folder, name, len(shards))
        for number, piece in enumerate(shards):
            of = f" {number + 1}/{len(shards)}" if len(shards) > 1 else ""
            make = partial(make_part, run, folder, name, model, lend, *piece, number=number)
            work = Work("evaluation", f"{name} of {model.name}{of}", make)
            started.setdefault(name, []).append(run.executor.submit(work))
    if "own" in started:
        answered = part_path(folder / "own", 0)
        started["own_judged"] = [judge_own(run, answered, model, folder / "own_judged", lend, started["own"])]
    return started


def submit_rewards(run: Run, model: Model, lend: Lend) -> Started:
    """Start what measures a reward model: it orders the held-out groups, as a judge does by its scores."""
    if run.config.evaluation.models == "none":
        return {}
    folder, tasks = run.campaign.folder / "evaluation" / model.name, evaluation.group_tasks(run.seed_data.heldout)
    make = partial(rewards.score_ranked, tasks, model=model.name)
    what = ["rewards", rewards.VERSION, [list(task) for task in tasks]]
    part = partial(make_part, run, folder, "heldout_rewards", model, lend, make, what)
    return {"heldout_rewards": [run.executor.submit(Work("evaluation", f"heldout_rewards of {model.name}", part))]}


def _pieces(run: Run, model: Model, *, judging_only: bool) -> dict[str, list[Piece]]:
    """Lay out everything that is asked of a model, in shards under the names of their folders."""
    seed, config = run.seed_data, run.config
    tasks = evaluation.group_tasks(seed.heldout)
    heldout = lay_out(run, model.name, tasks)
    if judging_only:
        return {"heldout": [heldout]}
    as_text = config.judgments.model_copy(update={"reading": "text", "justified": True, "k": 1})
    said, what = lay_out(run, model.name, tasks[: config.evaluation.text_judgments], as_text)
    pieces: dict[str, Piece] = {
        "responses": _answer(run, model, evaluation_prompts(seed.evaluation), "responses"),
        "heldout": heldout,
        "text": (said, [what, "text"]),
    }
    if config.evaluation.order_groups:
        pieces["order"] = _in_both_orders(run, model)
    if seed.attacks:
        pieces["attacks"] = lay_out(run, model.name, evaluation.attack_tasks(seed.attacks))
    if seed.requests:
        pieces["refusals"] = _asked_to_refuse(run, model)
    if config.evaluation.own_groups:
        pieces["own"] = _answer(run, model, evaluation_prompts(own_groups(run)), "own")
    shards = {name: [piece] for name, piece in pieces.items()}
    return shards | _suite_answers(run, model) | _capability(run)


def _in_both_orders(run: Run, model: Model) -> Piece:
    """Lay out the best and the worst response of held-out groups, each shown first once."""
    played = evaluation.best_against_worst(run.seed_data.heldout[: run.config.evaluation.order_groups])
    asked = comparisons.as_asked(run.config)
    compare = partial(comparisons.compare, played, judge_name=model.name, **asked)
    return compare, ["order", *comparisons.texts(run.config), [list(match) for match in played]]


def _answer(run: Run, model: Model, asked: pa.Table, name: str) -> Piece:
    """Lay out prompts for one answer each; rows PROMPTS."""
    how = run.config.evaluation.sampling
    answer = partial(responses.respond, asked, config=how, n=1, iteration=0, model=model.name, seed=run.config.seed)
    sampling = settings.pick(run.config, ("evaluation.sampling",))
    return answer, [name, responses.VERSION, store.rows_digest([asked], asked.schema), sampling]


def lay_out(run: Run, judge: str, tasks: Sequence[judgments.Task], how: JudgmentsConfig | None = None) -> Piece:
    """Lay out responses for a judge, who reads as the loop's does unless `how` says otherwise."""
    config = run.config
    make = partial(
        judgments.judge, tasks, config=how or config.judgments, iteration=0, judge_name=judge, seed=config.seed
    )
    read = settings.pick(config, judgments.SETTINGS)
    texts = judgments.texts(config)
    return make, [config.judgments.k, judgments.VERSION, read, texts, [list(task) for task in tasks]]


def own_groups(run: Run) -> Sequence[Mapping[str, Any]]:
    """Return the held-out groups whose prompts the models answer, too."""
    return run.seed_data.heldout[: run.config.evaluation.own_groups]


def _own_tasks(run: Run, answered: pa.Table) -> list[judgments.Task]:
    return own_answers.tasks(evaluation_prompts(own_groups(run)), answered)


def places(run: Run, answered: Path, judged: Iterable[Path]) -> dict[str, float]:
    """Place a model's own answers among people's, by judgments of both: prompt to place."""
    scored = _mean_scores(run.config, pa.concat_tables(store.read_part(path) for path in judged))
    return own_answers.places(own_groups(run), _own_tasks(run, store.read_part(answered)), scored)


def judge_own(
    run: Run, answered: Path, judge: Model, kept: Path, lend: Lend, after: Sequence[Pending[Made]] = ()
) -> Pending[Made]:
    """Start a judge's judgments of a model's answers to held-out prompts, once these are there."""

    def make() -> Made:
        own = lay_out(run, judge.name, _own_tasks(run, store.read_part(answered)))
        return make_part(run, kept.parent, kept.name, judge, lend, *own)

    shown = f"own answers of {answered.parents[1].name} judged by {judge.name}"
    return run.executor.submit(Work("evaluation", shown, make), after)


def _asked_to_refuse(run: Run, model: Model) -> Piece:
    """Lay out the requests of which a half should be refused, answered greedily: a refusal shows in its first words."""
    asked = evaluation_prompts(run.seed_data.requests)
    greedy = run.config.evaluation.sampling.model_copy(update={"temperature": 0.0, "max_tokens": REFUSAL_TOKENS})
    answer = partial(responses.respond, asked, config=greedy, n=1, iteration=0, model=model.name, seed=run.config.seed)
    return answer, ["refusals", responses.VERSION, store.rows_digest([asked], asked.schema), REFUSAL_TOKENS]


def _keep_prompts(run: Run, asked: pa.Table) -> None:
    """Keep what was asked beside the answers, for whoever reads them."""
    path, made_from = run.campaign.folder / "evaluation" / "prompts.parquet", store.rows_digest([asked], asked.schema)
    stamp = store.stamp_of(path)
    if stamp is None or stamp.fingerprint != made_from:
        store.write_part(path, asked, made_from)


def _suite_answers(run: Run, model: Model) -> dict[str, list[Piece]]:
    """Lay out the published benchmarks' questions in shards, for the engine that is open anyway."""
    config = run.config.evaluation.suites
    pieces: dict[str, list[Piece]] = {}
    for name, taken in run.seed_data.suites.items():
        for items in suite_shards(run, taken):
            make = partial(_answered, items, config.sampling, model.name, run.config.seed)
            what = [name, record.VERSION, [list(item[:5]) for item in items], config.sampling.model_dump(mode="json")]
            pieces.setdefault(name, []).append((make, what))
    return pieces


def _capability(run: Run) -> dict[str, list[Piece]]:
    """Lay out the tasks of the capability panel, a part each."""
    config = run.config.evaluation.suites
    panel = capability.Panel.of(config)
    made_from = capability.identity(panel) if config.capability else None
    return {
        f"capability_{task}": [(partial(capability.take, task, panel=panel), [task, made_from])]
        for task in config.capability
    }


def _answered(items: Sequence[Item], sampling: SamplingConfig, model: str, seed: int, engine: Engine) -> Tables:
    return record.answer(items, engine, sampling, model=model, seed=seed)


def suite_shards(run: Run, taken: Taken) -> list[list[Item]]:
    """Cut a benchmark's questions as its answers and their verdicts are kept: a list a part."""
    size = run.config.engine.shard_rows
    return [taken.items[start : start + size] for start in range(0, len(taken.items), size)]


def make_part(
    run: Run,
    folder: Path,
    name: str,
    model: Model,
    lend: Lend,
    make: Make,
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
    path, drops = part_path(folder / name, number), store.drops_path(folder, name, number)

    def fresh(present: pa.Table | None) -> Fresh:
        view = lend(model).stage(stage)
        return Fresh(*make(view), view.tokens)

    elsewhere = run.campaign.elsewhere(path, drops)
    made = materialize(path, made_from, fresh, drops=drops, elsewhere=elsewhere, fetch=run.fetch)
    run.tell("part", stage=stage, iteration=0, shard=number, path=made.path, reused=made.reused)
    return made


def finish(run: Run, model: Model, pending: Started) -> None:
    """Turn a model's evaluation tables into its results.json."""
    if not pending:
        return
    tables = {
        name: pa.concat_tables(store.read_part(part.result().path) for part in parts) for name, parts in pending.items()
    }
    config, seed = run.config, run.seed_data

    if "heldout_rewards" in tables:
        scores = rewards.known(tables["heldout_rewards"])
        _keep_results(run, model, {"judge": _measure_judge(run, scores)})
        run.reward_is_measured = True
        return

    def mean_scores(name: str) -> dict[str, float]:
        return _mean_scores(config, tables[name])

    lengths = {task.target_id: len(task.response) for task in evaluation.group_tasks(seed.heldout)}
    results: dict[str, Any] = {
        "judge": _measure_judge(run, mean_scores("heldout")),
        "judge_health": evaluation.judge_health(tables["heldout"], lengths),
    }
    if "text" in tables:
        results["text_reading"] = evaluation.judge_health(tables["text"])
    if "responses" in tables:
        results["responses"] = answers.describe(tables["responses"])
    if "order" in tables:
        results["order"] = evaluation.pull_of_order(tables["order"])
    if "own" in tables:
        judged = [part.result().path for part in (*pending["heldout"], *pending["own_judged"])]
        results["own_answers"] = own_answers.measure(places(run, pending["own"][0].result().path, judged))
    if "refusals" in tables:
        results["refusals"] = answers.refusals(seed.requests, tables["refusals"])
    if "attacks" in tables:
        results["attacks"] = evaluation.attack_shift(seed.attacks, mean_scores("attacks"))
    folder = run.campaign.folder / "evaluation" / model.name
    for name, taken in seed.suites.items():
        if name in tables:
            results.setdefault("suites", {})[name] = take_stock(folder, taken, tables[name], None)
    for task in config.evaluation.suites.capability:
        if f"capability_{task}" in tables:
            scored = capability.measure(task, tables[f"capability_{task}"])
            results.setdefault("suites", {}).setdefault("capability", {}).update(scored)
    run.measured[model.name] = None
    _keep_results(run, model, results)


def _measure_judge(run: Run, scores: Mapping[str, float]) -> dict[str, Any]:
    groups = evaluation.ranked(run.seed_data.heldout, scores)
    return evaluation.measure_judge(groups, samples=run.config.evaluation.bootstrap_samples, seed=run.config.seed)


def _keep_results(run: Run, model: Model, measured: dict[str, Any]) -> None:
    results = {"model": model.name, "digest": model.digest, **measured}
    store.write_json(run.campaign.folder / "evaluation" / model.name / "results.json", results)
    run.tell("evaluation", model=model.name, results=results)


def _mean_scores(config: RunConfig, judged: pa.Table) -> dict[str, float]:
    scored = judgments.scores(judged, k=config.judgments.k, required=config.judgments.required)
    return {target: score.mean for target, score in scored.items()}


def take_stock(folder: Path, taken: Taken, answered: pa.Table, verdicts: pa.Table | None) -> dict[str, Any]:
    """Measure a model's answers to one benchmark, and write them for the benchmark's own tool."""
    suite = taken.suite
    for name, content in (suite.files(taken.items, answered, verdicts, folder.name) if suite.files else {}).items():
        store.write_json(folder / suite.name / name, content)
    return suite.measure(taken.items, answered, verdicts)
