"""frozen_judge: what a judge that nobody trains says of all the models' answers, once they are all there."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import comparisons, evaluation, own_answers, store
from srlm_core.backend import Model
from srlm_core.config import RunConfig
from srlm_core.executor import Pending, Work
from srlm_core.measuring import Lend, evaluation_prompts, judge_own, lay_out, make_part, own_groups, places
from srlm_core.run import Run
from srlm_core.store import Made, part_path


def head_to_head(run: Run, judge: Model, lend: Lend) -> None:
    """Let the frozen judge compare the models' answers to the evaluation prompts, in both orders."""
    folder = run.campaign.folder / "evaluation" / "head_to_head"
    tallies = {
        name: evaluation.tally(rows, lengths)
        for name, (rows, lengths) in _all_matches(run, judge, lend, folder).items()
    }
    if tallies:
        store.write_json(folder / "results.json", {**_who_judged(run, judge), "comparisons": tallies})
        run.tell("evaluation", model="head_to_head", results=tallies)


def meet(run: Run, judge: Model, lend: Lend, newer: str, older: str) -> dict[str, Any] | None:
    """Let the frozen judge compare two models before the others have answered; None where one of the two has not.

    The part that it makes is the one that `head_to_head` finds later.
    """
    folder = run.campaign.folder / "evaluation"
    if not {newer, older} <= set(_answered(run)):
        return None
    ((rows, lengths),) = _play(run, judge, lend, folder / "head_to_head", [(newer, older)]).values()
    return evaluation.tally(rows, lengths)


def place_own_answers(run: Run, judge: Model, lend: Lend) -> None:
    """Let the frozen judge place the models' own answers among people's, as each model did: see own_answers.py."""
    folder = run.campaign.folder / "evaluation"
    own = {name: part_path(folder / name / "own", 0) for name in run.measured if run.model(name).digest != judge.digest}
    own = {name: path for name, path in own.items() if path.exists()}
    if not run.config.evaluation.own_groups or not own:
        return
    kept = folder / "head_to_head"
    pending = {name: judge_own(run, path, judge, kept / f"own_of_{name}", lend) for name, path in own.items()}
    yardstick = _peoples_responses(run, judge, lend, kept)
    for name, work in pending.items():
        mine = [part_path(folder / name / judged, 0) for judged in ("heldout", "own_judged")]
        by_itself = places(run, own[name], mine)
        by_judge = places(run, own[name], [yardstick, work.result().path])
        results = store.read_json(folder / name / "results.json")
        results["own_answers"] = own_answers.measure(by_itself, by_judge)
        store.write_json(folder / name / "results.json", results)
        run.tell("evaluation", model=name, results=results)


def _peoples_responses(run: Run, judge: Model, lend: Lend, kept: Path) -> Path:
    """Return the judge's judgments of people's responses; one of the models measured has made them already."""
    if judge.name in run.measured:
        return part_path(run.campaign.folder / "evaluation" / judge.name / "heldout", 0)
    people = lay_out(run, judge.name, evaluation.group_tasks(own_groups(run)))
    part = partial(make_part, run, kept, "people", judge, lend, *people)
    return run.executor.submit(Work("evaluation", f"held-out responses judged by {judge.name}", part)).result().path


def other_judges(run: Run) -> None:
    """Let the further judges compare the same answers, one after another, and say how far they agree with the first."""
    folder = run.campaign.folder / "evaluation" / "head_to_head"
    found = store.read_json(folder / "results.json")
    told: list[dict[str, Any]] = []
    for number, name in enumerate(run.config.evaluation.more_judges if found else ()):
        judge = run.role(name, run.base)
        with run.phase(f"head to head by {judge.name}"), run.engines() as lend:
            matches = _all_matches(run, judge, lend, folder / f"judge_{number + 2}")
        comparisons = {
            pair: evaluation.tally(rows, lengths)
            | {"agreement": evaluation.agreement(_results_of_the_first(folder, pair), evaluation.results(rows))}
            for pair, (rows, lengths) in matches.items()
        }
        told.append({**_who_judged(run, judge), "comparisons": comparisons})
    if found:
        store.write_json(folder / "results.json", {**found, "other_judges": told})


def _results_of_the_first(folder: Path, pair: str) -> dict[tuple[str, str], float]:
    return evaluation.results(store.read_part(part_path(folder / pair, 0)))


def _who_judged(run: Run, judge: Model) -> dict[str, Any]:
    """Name a judge and the models it compared; `plays_itself` are those that it is one of."""
    answered = run.campaign.folder.glob("evaluation/*/responses")
    digests = {path.parent.name: run.model(path.parent.name).digest for path in answered}
    met = {name for pair in head_to_heads(run.config, set(digests)) for name in pair}
    plays = sorted(name for name in met if digests[name] == judge.digest)
    return {"judge": judge.name, "judge_digest": judge.digest, "plays_itself": plays, "digests": digests}


def _all_matches(run: Run, judge: Model, lend: Lend, folder: Path) -> dict[str, tuple[pa.Table, dict[str, int]]]:
    """Play all comparisons under one judge: by name its verdicts, and the lengths of the answers by id."""
    return _play(run, judge, lend, folder, head_to_heads(run.config, set(_answered(run))))


def _answered(run: Run) -> dict[str, Path]:
    """Find the models' answers to the evaluation prompts."""
    found = run.campaign.folder.glob("evaluation/*/responses/part-00000.parquet")
    return {path.parent.parent.name: path for path in found}


def _play(
    run: Run, judge: Model, lend: Lend, folder: Path, pairs: Sequence[tuple[str, str]]
) -> dict[str, tuple[pa.Table, dict[str, int]]]:
    asked, answered = evaluation_prompts(run.seed_data.evaluation), _answered(run)
    pending: dict[str, tuple[Pending[Made], dict[str, int]]] = {}
    for newer, older in pairs:
        a, b = store.read_part(answered[newer]), store.read_part(answered[older])
        played = evaluation.matches(asked, a, b)
        name = f"{newer}_vs_{older}"
        compare = partial(comparisons.compare, played, judge_name=judge.name)
        what = ["head to head", evaluation.VERSION, [list(match) for match in played]]
        work = partial(make_part, run, folder, name, judge, lend, compare, what)
        lengths = {row["response_id"]: len(row["response"]) for row in a.to_pylist() + b.to_pylist()}
        pending[name] = run.executor.submit(Work("evaluation", name.replace("_", " "), work)), lengths
    return {name: (store.read_part(work.result().path), lengths) for name, (work, lengths) in pending.items()}


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
