"""table: a row per model, for the console, the report, MLflow and Prefect."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srlm_core.spelling import escape_markdown, in_columns, spell
from srlm_core.summary import Summary, collect


def of_campaign(folder: Path) -> list[dict[str, Any]]:
    """Lay out a row per model, from M0 to the last; a value that is not known is None."""
    return rows(collect(folder))


def rows(summary: Summary) -> list[dict[str, Any]]:
    """Lay out a row per model; what M_t generated stands beside how M_t was evaluated."""
    result: list[dict[str, Any]] = []
    for model in summary.models:
        number = re.fullmatch(r"M(\d+)", model)
        t = int(number[1]) if number else None
        before = f"M{t - 1}" if t else None
        measured, made = summary.of_model[model], summary.of_iteration.get(t or 0, {})
        row: dict[str, Any] = {"model": model, "before": before}
        for key, name in _ROW_EVALUATION.items():
            row |= _with_error(key, measured, f"evaluation/{name}")
        row |= _with_error("win_rate_vs_before", measured, f"evaluation/win_rate_vs_{before}")
        for key, name in _ROW_ITERATION.items():
            row |= _with_error(key, made, name)
        result.append(row)
    return result


_ROW_EVALUATION = {
    "judge_accuracy": "judge_pairwise_accuracy",
    "judge_accuracy_tie_half": "judge_pairwise_accuracy_tie_half",
    "longer_accuracy": "longer_accuracy",
    "text_readable_rate": "text_readable_rate",
    "response_tokens": "response_length_tokens_mean",
    "win_rate_vs_sft_baseline": "win_rate_vs_sft_baseline",
    "attack_shift": "attack_shift",
}
_ROW_ITERATION = {
    "readable_rate": "judgments/readable_rate",
    "score_mean": "judgments/score_mean",
    "tie_rate": "judgments/tie_rate",
    "pairs": "pairs/n",
    "pairs_yield": "pairs/yield",
}


def _with_error(key: str, metrics: Mapping[str, float], name: str) -> dict[str, Any]:
    return {
        key: metrics.get(name),
        f"{key}_stderr": metrics.get(f"{name}_stderr"),
        f"{key}_n": None if (n := metrics.get(f"{name}_n")) is None else int(n),
    }


class Column(NamedTuple):
    """How one measure of the table is shown."""

    key: str
    label: str
    form: str
    """Format of the number: `.2f`, `+.2f`, `.0f`."""
    note: str


COLUMNS = (
    Column(
        "judge_accuracy", "judge accuracy", ".2f", "held-out pairs that it orders as they are ranked; a tie is wrong"
    ),
    Column("judge_accuracy_tie_half", "… ties as halves", ".2f", "the same, a tie as half right: 0.5 is guessing"),
    Column("longer_accuracy", "… of length alone", ".2f", "always preferring the longer response, on the same pairs"),
    Column("text_readable_rate", "readable as text", ".2f", "held-out judgments in the text form that could be read"),
    Column("score_mean", "mean own score", ".2f", "what it gave its own responses, 0 to 5; its own opinion"),
    Column("tie_rate", "prompts tied", ".2f", "prompts dropped because best and worst score are equal"),
    Column("pairs", "pairs", ".0f", "pairs made with it, which train the next model"),
    Column("pairs_yield", "prompts paired", ".2f", "prompts that gave a pair, of those that reached pairing"),
    Column("response_tokens", "response tokens", ".0f", "mean length of its answers to the evaluation prompts"),
    Column(
        "win_rate_vs_before", "wins vs one before", ".2f", "head to head against the model before it; a tie is half"
    ),
    Column("win_rate_vs_sft_baseline", "wins vs baseline", ".2f", "head to head against sft_baseline; a tie is half"),
    Column("attack_shift", "shift by attacks", "+.2f", "rubric points that manipulative text adds to a response"),
)


def cell(row: Mapping[str, Any], column: Column) -> str:
    """Write one cell of the table."""
    return spell(row[column.key], row[f"{column.key}_stderr"], form=column.form)


def as_text(table_rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the table out for a terminal: a line per measure and a column per model: 80 columns hold five."""
    grid = [["", *(_of(row) for row in table_rows)]]
    grid += [[column.label, *(cell(row, column).replace(" ", "") for row in table_rows)] for column in COLUMNS]
    return "\n".join([*in_columns(grid), *_footnotes(table_rows)])


def as_markdown(table_rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the table out in Markdown, a row per model."""
    head = ["model", *(column.label for column in COLUMNS)]
    body = [[escape_markdown(_of(row)), *(cell(row, column) for column in COLUMNS)] for row in table_rows]
    grid = [head, ["---", *("--:" for _ in COLUMNS)], *body]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in grid), "", " ".join(_footnotes(table_rows))])


def _of(row: Mapping[str, Any]) -> str:
    """Name the model of a row; where rows of several campaigns stand side by side they say which."""
    return f"{row['campaign']}/{row['model']}" if "campaign" in row else row["model"]


def _footnotes(table_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    pairs = {row["judge_accuracy_n"] for row in table_rows} - {None}
    wins = ("win_rate_vs_before", "win_rate_vs_sft_baseline")
    matches = {row[f"{key}_n"] for row in table_rows for key in wins} - {None}
    notes = ["± is one standard error."]
    if pairs:
        notes.append(f"Judge accuracy is over {_range(pairs)} held-out pairs; 0.5 with ties as halves is guessing.")
    if matches:
        notes.append(f"Wins are over {_range(matches)} prompts, a tie counts 1/2.")
    return notes


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
