"""record: what a published benchmark is to the loop: its questions, how a judge reads the answers, and the figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import responses, schemas
from srlm_core.config import SamplingConfig
from srlm_core.engines.protocol import Engine, Message, Request, Sampling
from srlm_core.errors import DataError
from srlm_core.judgments import Verdict
from srlm_core.sources.files import Broken, objects
from srlm_core.store import digest, seed_for

VERSION = 1


class Item(NamedTuple):
    """One question of a benchmark."""

    item_id: str
    turns: tuple[str, ...]
    """What is asked, one turn after another; each is answered before the next is shown."""
    category: str = ""
    references: tuple[str, ...] = ()
    """What answers are held against, one for each turn: the baseline's, or right ones. Empty where there are none."""
    temperature: float | None = None
    """Where the benchmark says how its answers are drawn."""
    published: Mapping[str, Any] = {}
    """The row as it was published, where its figures need more of it."""

    @property
    def prompt_id(self) -> str:
        """Name the question in the campaign's tables."""
        return digest("suite", self.item_id, *self.turns)


class Asked(NamedTuple):
    """One thing that a judge is asked: how an answer is, or whether it is better than the baseline's."""

    item: Item
    place: int
    """Which turn, or which order."""
    target_id: str
    """The response that is judged."""
    messages: tuple[Message, ...]
    first: str | None = None
    """In a comparison, what is shown first: the response's id, or `BASELINE`."""


BASELINE = "baseline"


class Judge(NamedTuple):
    """Who reads the answers, and how much it may write."""

    engine: Engine
    name: str
    max_tokens: int
    seed: int


Tables = tuple[pa.Table, pa.Table]
"""Rows, and DROPS."""


class Suite(NamedTuple):
    """One published benchmark. `judged`: needs a judge, whose verdicts are JUDGMENTS; without one there are answers."""

    name: str
    read: Callable[[str], list[Item]]
    """From a file, folder or dataset in its published form; raises DataError where no question can be used."""
    measure: Callable[[Sequence[Item], pa.Table, pa.Table | None], dict[str, Any]]
    """Figures from the questions, the answers (RESPONSES) and the verdicts (JUDGMENTS, or null: not judged)."""
    judge: Callable[[Sequence[Item], pa.Table, Judge], Tables] | None = None
    rubrics: tuple[str, ...] = ()
    """Names of the judge's templates."""
    files: Callable[[Sequence[Item], pa.Table, pa.Table | None, str], Mapping[str, Any]] | None = None
    """Lay out a model's answers and the verdicts on them as the benchmark's own tool does: {file name: JSON}."""

    @property
    def judged(self) -> bool:
        """Whether its figures are a judge's."""
        return self.judge is not None


def rows_of(where: str | Path, needed: Sequence[str], *, may_be_empty: str | None = None) -> list[dict[str, Any]]:
    """Read the rows that have the needed columns, none of them empty but one that may be.

    Raises DataError where no row has.
    """
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, row in objects(str(where)):
        if isinstance(row, Broken):
            wrong.append(f"row {number}: {row.reason}")
        elif missing := [name for name in needed if _lacks(row, name, name == may_be_empty)]:
            wrong.append(f"row {number} has no {', '.join(missing)}")
        else:
            rows.append(row)
    if not rows:
        told = f"; first: {wrong[0]}" if wrong else ""
        raise DataError(f"expected rows with {', '.join(needed)} in {where}, got none{told}.")
    return rows


def _lacks(row: Mapping[str, Any], name: str, may_be_empty: bool) -> bool:
    return row.get(name) is None or (not may_be_empty and row[name] in ("", []))


def answer(items: Sequence[Item], engine: Engine, config: SamplingConfig, *, model: str, seed: int) -> Tables:
    """Answer each question, turn after turn; rows RESPONSES (index = turn), in the questions' order, and DROPS.

    A turn whose conversation no longer fits the context is dropped with its reason, and so are those after it.
    """
    usual = responses.sampling(config)
    said: dict[str, list[str]] = {item.prompt_id: [] for item in items}
    rows: dict[tuple[str, int], dict[str, object]] = {}
    drops: list[dict[str, object]] = []
    for turn in range(max((len(item.turns) for item in items), default=0)):
        due = [item for item in items if len(item.turns) > turn == len(said[item.prompt_id])]
        seeds = {item.prompt_id: seed_for(seed, 0, "suites", item.prompt_id, turn) for item in due}
        requests = (
            Request(item.prompt_id, _conversation(item, said[item.prompt_id]), sampling=_drawn(usual, item),
                    seed=seeds[item.prompt_id])
            for item in due
        )  # fmt: skip
        for done in engine.generate(requests):
            name = done.request_id
            if done.finish_reason == "too_long":
                drop = {"id": name, "stage": "evaluation", "reason": "prompt_too_long", "iteration": 0}
                drops.append({**drop, "detail": f"turn {turn + 1}"})
                continue
            said[name].append(done.text)
            rows[name, turn] = {
                "response_id": digest(name, model, turn, done.text), "prompt_id": name, "iteration": 0, "index": turn,
                "response": done.text, "n_tokens": done.n_tokens, "finish_reason": done.finish_reason,
                "source": "policy", "model": model, "seed": seeds[name],
            }  # fmt: skip
    in_order = (rows[item.prompt_id, turn] for item in items for turn in range(len(said[item.prompt_id])))
    return schemas.table(in_order, schemas.RESPONSES), schemas.table(drops, schemas.DROPS)


def _conversation(item: Item, said: Sequence[str]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for turn, asked in enumerate(item.turns[: len(said) + 1]):
        messages.append({"role": "user", "content": asked})
        if turn < len(said):
            messages.append({"role": "assistant", "content": said[turn]})
    return tuple(messages)


def _drawn(usual: Sampling, item: Item) -> Sampling:
    return usual if item.temperature is None else replace(usual, temperature=item.temperature, top_p=1.0)


def by_item(items: Iterable[Item], answers: pa.Table) -> list[tuple[Item, list[dict[str, Any]]]]:
    """Pair the questions with their answers, turn by turn; questions without an answer are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in answers.to_pylist():
        found.setdefault(row["prompt_id"], []).append(row)
    return [(item, found[item.prompt_id]) for item in items if item.prompt_id in found]


def written(
    asked: Sequence[Asked], judge: Judge, read: Callable[[str, str], Verdict], *, form: str, rubric: str
) -> Tables:
    """Let a judge write its verdicts, greedily, and read them; rows JUDGMENTS, and DROPS for prompts too long for it.

    `read` takes what was written and why it ended; what cannot be read is null with a reason.
    """
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=judge.max_tokens)
    keyed = {f"{one.target_id}/{one.place}": one for one in asked}
    requests = (Request(key, one.messages, sampling=sampling, seed=judge.seed) for key, one in keyed.items())
    done = {completion.request_id: completion for completion in judge.engine.generate(requests)}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for key, one in keyed.items():
        completion = done[key]
        if completion.finish_reason == "too_long":
            drops.append(too_long(one, judge))
            continue
        verdict = read(completion.text, completion.finish_reason)
        told = {"reading": "text", "text": completion.text, "finish_reason": completion.finish_reason}
        rows.append(judgment(one, judge, verdict, form=form, rubric=rubric, **told))
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


def judgment(asked: Asked, judge: Judge, verdict: Verdict, *, form: str, rubric: str, **told: str) -> dict[str, object]:
    """Lay out one verdict as a row of JUDGMENTS."""
    return {
        "judgment_id": digest(asked.target_id, asked.place, judge.name, rubric), "target_id": asked.target_id,
        "other_id": None if asked.first is None else BASELINE, "first": asked.first,
        "prompt_id": asked.item.prompt_id, "iteration": 0, "index": asked.place, "form": form, "judge": judge.name,
        "rubric": rubric, "verdict": verdict.value, "unreadable_reason": verdict.unreadable_reason,
        "seed": judge.seed, **told,
    }  # fmt: skip


def too_long(asked: Asked, judge: Judge) -> dict[str, object]:
    """Lay out a row of DROPS for what a judge could not be shown."""
    row = {"id": digest(asked.target_id, asked.place, judge.name), "stage": "evaluation"}
    return {**row, "reason": "judge_prompt_too_long", "iteration": 0, "detail": asked.item.item_id}
