"""judge_data: what M1 learns of judging, where a model writes it: judgments of ranked responses, or comparisons.

Everything is made in parts through the engine that is open, and found made when it is run again.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import (
    comparisons,
    eft,
    evaluation,
    judgments,
    measuring,
    responses,
    schemas,
    self_taught,
    sources,
    store,
)
from srlm_core.backend import Model
from srlm_core.comparisons import Match
from srlm_core.data import SetAside, spread
from srlm_core.engines.on_demand import OnDemand
from srlm_core.engines.protocol import Engine
from srlm_core.errors import NothingLeft
from srlm_core.executor import Pending, Work
from srlm_core.run import BASELINE, Run
from srlm_core.store import Made


def keep_set_aside(run: Run, name: str, lines: Sequence[SetAside]) -> None:
    """Keep what was left out of the seed data, with its reasons, for the report."""
    path = run.campaign.folder / "bootstrap" / "set_aside" / f"{name}.json"
    store.write_json(path, [{"line": line.line, "reason": line.reason, "text": line.text} for line in lines])
    run.tell("set_aside", file=name, count=len(lines), where=str(path))


# --- from people's rankings -----------------------------------------------------------------------------------------


def judge_groups(run: Run, groups: Sequence[eft.Group]) -> list[eft.Group]:
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
    keep_set_aside(run, "eft_judged", [SetAside(None, why, group["prompt"][:300]) for group, why in targets.set_aside])
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
    what = [
        judgments.VERSION,
        how.model_dump(mode="json", exclude={"steps", "comparisons_justified"}),
        rubric,
        [list(task) for task in work],
    ]
    folder, name = run.campaign.folder / "bootstrap", f"judgments of EFT {number + 1}/{len(shards)}"
    part = partial(
        measuring.make_part, run, folder, "judgments", judge, lend, make, what, number=number, stage="judgments"
    )
    return run.executor.submit(Work("judgments", name, part))


# --- judge data without people's judgments --------------------------------------------------------------------------


class _Tried(NamedTuple):
    """What became of a shard of IFT's instructions."""

    n_usable: int
    played: list[Match]
    judged: pa.Table
    aside: list[self_taught.Aside]


def self_taught_rows(run: Run) -> pa.Table:
    """Lay out M1's lessons in comparing: which is better, people's response or the answer to another request.

    sft_baseline is measured meanwhile: its engine is open.
    """
    seed, size = run.config.seed_data, run.config.engine.shard_rows
    model, folder = run.model(seed.eft_endpoint or BASELINE), run.campaign.folder / "bootstrap"
    ift = spread(sources.first_of_each(run.seed_data.ift, "instruction"), seed.eft_groups)
    shards = [ift[start : start + size] for start in range(0, len(ift), size)]
    run.tell("shards", stage="judgments", iteration=0, total=len(shards))
    with run.phase("judge data"), run.engines() as lend:
        pending = [
            run.executor.submit(Work("judgments", f"judge data of IFT {number + 1}/{len(shards)}", partial(
                _try_shard, run, model, lend, shard, number)))
            for number, shard in enumerate(shards)
        ]  # fmt: skip
        everyone = model.name == BASELINE and run.config.evaluation.models == "all"
        started = measuring.submit(run, model, lend) if everyone else {}
        tried = [work.result() for work in pending]
        measuring.finish(run, model, started)
    for name in ("modified", "answers", "judgments"):
        unasked = name == "judgments" and seed.eft_form == "score"
        store.forget_later_parts(folder, name, 0 if unasked else len(shards))
    return self_taught.examples(_taught_of(run, model, len(ift), tried), justified=seed.eft_form == "justified")


def _try_shard(run: Run, model: Model, lend: measuring.Lend, ift: Sequence[Mapping[str, Any]], number: int) -> _Tried:
    """Have another request written for each instruction, have it answered and, where that is taught, judged."""
    how, seed, folder = run.config.seed_data, run.config.seed, run.campaign.folder / "bootstrap"
    drawn = [self_taught.VERSION, how.eft_sampling.model_dump(mode="json")]

    def made(name: str, make: Callable[[Engine], tuple[pa.Table, pa.Table]], *of: Any) -> pa.Table:
        part = measuring.make_part(
            run, folder, name, model, lend, make, [*drawn, *of], number=number, stage="judgments"
        )
        return store.read_part(part.path)

    write = partial(self_taught.modify, ift, how=how.eft_sampling, model=model.name, seed=seed)
    instructions = [row["instruction"] for row in ift]
    modified = made("modified", write, self_taught.rubric().identity, instructions)
    asked, no_request = self_taught.usable(ift, modified, run.seed_data.measuring)
    answer = partial(responses.respond, asked, config=how.eft_sampling, n=1, iteration=0, model=model.name, seed=seed)
    answered = made("answers", answer, responses.VERSION, store.rows_digest([asked], asked.schema))
    played, no_answer = self_taught.matches(ift, asked, answered)
    judged = schemas.JUDGMENTS.empty_table()
    if how.eft_form == "justified":
        say = partial(
            self_taught.judge, played, how=how.eft_sampling, passes=how.eft_passes, model=model.name, seed=seed
        )
        rubric = comparisons.pairwise(justified=True).identity
        judged = made("judgments", say, rubric, how.eft_passes, [list(match) for match in played])
    return _Tried(asked.num_rows, played, judged, no_request + no_answer)


def _taught_of(run: Run, model: Model, n_tried: int, tried: Sequence[_Tried]) -> list[self_taught.Trace]:
    """Choose what is taught, and keep count of all. Raises NothingLeft, saying what to do, where nothing can be."""
    played = [match for one in tried for match in one.played]
    judged = pa.concat_tables(one.judged for one in tried)
    found, counts = self_taught.bare(played), Counter[str]()
    if run.config.seed_data.eft_form == "justified":
        found, counts = self_taught.right(played, judged)
    taught = self_taught.balanced(found)
    told = {
        "targets": "self_taught", "judge": model.name, "instructions": n_tried,
        "modified": sum(one.n_usable for one in tried), "pairs": len(played), **counts,
        "one_sided": len(found) - len(taught), "taught": len(taught),
    }  # fmt: skip
    aside = [SetAside(None, why, prompt[:300]) for one in tried for prompt, why in one.aside]
    keep_set_aside(run, "eft_judged", aside)
    store.write_json(run.campaign.folder / "bootstrap" / "eft.json", told)
    if not taught:
        why = Counter(one.reason for one in aside)
        raise NothingLeft(
            f"EFT: expected comparisons by {model.name} to teach M1, got none "
            f"({', '.join(f'{name} {count}' for name, count in told.items() if isinstance(count, int))}"
            f"{''.join(f'; {reason}: {count}' for reason, count in why.most_common(3))}). "
            + ("Teach the verdict alone (seed_data.eft_form=score, judgments.comparisons_justified=false), or let"
               if played else "Let")
            + " a stronger model write (seed_data.eft_endpoint), or raise seed_data.eft_sampling.max_tokens."
        )  # fmt: skip
    return taught
