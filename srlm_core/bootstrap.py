"""bootstrap: sft_baseline and M1 from M0, by the data that people wrote and ranked."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import eft, evaluation, judgments, measuring, store, training
from srlm_core.backend import Model
from srlm_core.config import RunConfig
from srlm_core.data import SetAside
from srlm_core.engines.on_demand import OnDemand
from srlm_core.engines.protocol import Engine
from srlm_core.errors import NothingLeft
from srlm_core.executor import Pending, Work
from srlm_core.lesson import Lesson, take_as, teach
from srlm_core.methods import METHODS
from srlm_core.run import BASELINE, Run
from srlm_core.store import Made, digest


def bootstrap(run: Run) -> None:
    """Train sft_baseline on IFT, and M1 on IFT + EFT, both from M0 (section 2.3).

    Where the method needs no judge, M1 is sft_baseline.
    """
    folder, config, seed = run.campaign.folder / "bootstrap", run.config, run.seed_data
    teaches_judging = METHODS[config.method].teaches_judging
    _forget_seed_data(folder, judged=teaches_judging and config.seed_data.eft_is_judged)
    for name, lines in seed.set_aside.items():
        _keep_set_aside(run, name, lines)
    with run.phase("base model"):
        base = run.base
    ift = _seed_rows(folder / "ift.parquet", training.ift_examples(seed.ift))
    teach(run, Lesson(BASELINE, "sft", lambda: [ift], config.training.sft, base, None, folder))
    if teaches_judging:
        eft_rows = _eft_rows(run, folder)
        teach(run, Lesson("M1", "sft", lambda: [ift, eft_rows], config.training.sft, base, None, folder))
    else:
        (folder / "eft.parquet").unlink(missing_ok=True)
        take_as(run, "M1", run.model(BASELINE))


def _eft_rows(run: Run, folder: Path) -> pa.Table:
    config, groups = run.config, run.seed_data.eft
    if config.seed_data.eft_is_judged:
        groups = _judge_eft(run, groups)
    asked = _asked_in_eft(config, groups)
    return _seed_rows(folder / "eft.parquet", training.eft_examples(groups, asked, config.seed_data.eft_form))


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
    what = [judgments.VERSION, how.model_dump(mode="json", exclude={"steps"}), rubric, [list(task) for task in work]]
    folder, name = run.campaign.folder / "bootstrap", f"judgments of EFT {number + 1}/{len(shards)}"
    part = partial(
        measuring.make_part, run, folder, "judgments", judge, lend, make, what, number=number, stage="judgments"
    )
    return run.executor.submit(Work("judgments", name, part))
