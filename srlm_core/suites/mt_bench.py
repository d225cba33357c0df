"""mt_bench: MT-Bench (Zheng et al., arXiv:2306.05685): 80 questions of two turns, each answer graded from 1 to 10.

Answers to mathematics, reasoning and coding are graded beside a right answer, where the folder has one. The templates
are ours. A grade that cannot be read is left out and counted, never averaged in.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import judgments
from srlm_core.errors import DataError
from srlm_core.judgments import Verdict
from srlm_core.rates import rate
from srlm_core.suites.record import Asked, Item, Judge, Suite, Tables, by_item, rows_of, written

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""How answers of a category are drawn; all others greedily (section 3 of the published tool's settings)."""
_GRADE = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]")


def read(where: str) -> list[Item]:
    """Read a folder with question.jsonl and, where there are any, right answers (reference_answer*); or the file."""
    path = Path(where).expanduser()
    questions = path / "question.jsonl" if path.is_dir() else path
    beside = sorted(questions.parent.glob("reference_answer*.jsonl"))
    beside += sorted(questions.parent.glob("reference_answer/*.jsonl"))
    if len(beside) > 1:
        raise DataError(
            f"expected one file of reference answers beside {questions}, got {', '.join(map(str, beside))}."
        )
    right = (
        {row["question_id"]: _turns(row) for row in rows_of(beside[0], ("question_id", "choices"))} if beside else {}
    )
    rows = rows_of(questions, ("question_id", "category", "turns"))
    return [
        Item(str(row["question_id"]), tuple(row["turns"]), row["category"],
             tuple(row.get("reference") or right.get(row["question_id"], ())), TEMPERATURES.get(row["category"], 0.0))
        for row in rows
    ]  # fmt: skip


def _turns(row: dict[str, Any]) -> list[str]:
    return row["choices"][0]["turns"]


def judge(items: Sequence[Item], answers: pa.Table, by: Judge) -> Tables:
    """Grade each turn's answer from 1 to 10, the second with the first before it."""
    plain, beside = (judgments.load_rubric(name, justified=None) for name in SUITE.rubrics)
    with_reference: list[Asked] = []
    without: list[Asked] = []
    for item, said in by_item(items, answers):
        for turn, row in enumerate(said):
            conversation = _told(item.turns, [one["response"] for one in said[: turn + 1]])
            if item.references:
                right = _told(item.turns, item.references[: turn + 1])
                asked = beside.ask(conversation=conversation, reference=right)
                with_reference.append(Asked(item, turn, row["response_id"], asked))
            else:
                without.append(Asked(item, turn, row["response_id"], plain.ask(conversation=conversation)))
    graded = [
        written(asked, by, grade, form="pointwise", rubric=rubric.identity)
        for asked, rubric in ((without, plain), (with_reference, beside))
    ]
    return pa.concat_tables(rows for rows, _ in graded), pa.concat_tables(drops for _, drops in graded)


def _told(asked: Sequence[str], said: Sequence[str]) -> str:
    turns = zip(asked, said, strict=False)
    return "\n\n".join(f"[user] {question}\n\n[assistant] {answer}" for question, answer in turns)


def grade(text: str, finish_reason: str) -> Verdict:
    """Read the last grade in double brackets, such as [[7]]; null where it was cut off, is missing, or not 1 to 10."""
    if finish_reason != "stop":
        return Verdict(None, judgments.why_not_whole(finish_reason))
    marks = _GRADE.findall(text)
    if not marks:
        return Verdict(None, "no_score_line")
    value = float(marks[-1])
    return Verdict(value, None) if 1 <= value <= 10 else Verdict(None, "out_of_range")


def measure(items: Sequence[Item], answers: pa.Table, verdicts: pa.Table | None) -> dict[str, Any]:
    """Return the mean grade of questions (each the mean of its turns), by turn, by category; how many were read."""
    if verdicts is None:
        return {"answered": len(by_item(items, answers))}
    category = {item.prompt_id: item.category for item in items}
    grades: defaultdict[str, list[float]] = defaultdict(list)
    turns: defaultdict[int, list[float]] = defaultdict(list)
    rows = verdicts.to_pylist()
    for row in rows:
        if row["verdict"] is not None:
            grades[row["prompt_id"]].append(row["verdict"])
            turns[row["index"]].append(row["verdict"])
    means = {question: sum(values) / len(values) for question, values in grades.items()}
    of: defaultdict[str, list[float]] = defaultdict(list)
    for question, mean in means.items():
        of[category[question]].append(mean)
    return {
        "score": rate(list(means.values()))._asdict(),
        **{f"turn_{turn + 1}": rate(values)._asdict() for turn, values in sorted(turns.items())},
        "readable_rate": rate([float(row["verdict"] is not None) for row in rows])._asdict(),
        "categories": {name: rate(values)._asdict() for name, values in sorted(of.items())},
    }


SUITE = Suite("mt_bench", read, measure, judge, ("mt_bench", "mt_bench_reference"))
