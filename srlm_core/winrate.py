"""winrate: pairwise annotations of answers against one baseline, turned into win rates, plain and length-controlled.

The plain rate is AlpacaEval 2's. The length-controlled one asks how often a model would win if its answers were as long
as the baseline's (Dubois et al., arXiv:2404.04475, section 3), fitted from the annotations at hand; METHODS.md says
where this differs from the official fit.
"""

import gzip
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from srlm_core.errors import DataError
from srlm_core.length_control import length_controlled
from srlm_core.spelling import in_columns, spell


class WinRate(NamedTuple):
    """One model against the baseline. Rates and errors in percent, as leaderboards print them; null: not measurable."""

    win_rate: float
    """Mean of preference - 1, so a weighted verdict counts by its weight."""
    win_rate_stderr: float | None
    length_controlled_win_rate: float | None
    length_controlled_win_rate_stderr: float | None
    discrete_win_rate: float
    """Wins and half the draws, however narrow."""
    wins: int
    draws: int
    losses: int
    n: int
    mean_length: float | None
    """Characters of the model's answers."""


class Verdict(NamedTuple):
    """One annotation: how a model's answer to an instruction fared against the baseline's."""

    model: str
    instruction: str
    won: float
    """1: the model wins, 0: the baseline does; between them a verdict's weight."""
    longer: float | None
    """Characters that the model's answer has more than the baseline's."""
    length: float | None


class Annotations(NamedTuple):
    """What a file of annotations holds."""

    verdicts: list[Verdict]
    baseline: str | None
    set_aside: dict[str, int]
    """Reason to rows that could not be used."""


def read(path: Path) -> Annotations:
    """Read annotations from CSV (also .gz) or from AlpacaEval's own annotations.json.

    Columns: preference (1 to 2, 2: the model wins); model or generator_2; instruction_index or instruction; where there
    are any, generator_1, and len_output_1 and len_output_2 or output_1 and output_2. Raises DataError where a needed
    column is missing, where there are two baselines, and where no row can be used.
    """
    rows = _rows(path)
    names = [_named(path, rows, *names) for names in _NEEDED]
    verdicts: dict[tuple[str, str], Verdict] = {}
    aside: Counter[str] = Counter()
    for row in rows:
        read_one = _verdict(row, *names)
        if isinstance(read_one, str):
            aside[read_one] += 1
        elif (key := (read_one.model, read_one.instruction)) in verdicts:
            aside["a second annotation of the same answer"] += 1
        else:
            verdicts[key] = read_one
    if not verdicts:
        raise DataError(f"expected annotations in {path}, got no row that can be used: {dict(aside) or 'it is empty'}.")
    baselines = sorted({str(row["generator_1"]) for row in rows if not _absent(row.get("generator_1"))})
    if len(baselines) > 1:
        raise DataError(
            f"expected one baseline under generator_1 in {path}, got {', '.join(baselines[:5])}. "
            "Rates against different baselines cannot be compared: split the file."
        )
    return Annotations(list(verdicts.values()), baselines[0] if baselines else None, dict(aside))


_NEEDED = (("model", "generator_2"), ("instruction_index", "instruction"), ("preference",))


def _rows(path: Path) -> list[dict[Any, Any]]:
    try:
        if ".json" not in path.suffixes:
            # as text: an index stays as it is written, and NA may be a name
            return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        rows = json.loads((gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("JSON that is no list of objects")
        return rows
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected annotations as CSV (.csv) or JSON (.json), also .gz, in {path}, got: {error}. Check the file."
        ) from error


def _named(path: Path, rows: Sequence[Mapping[Any, Any]], *names: str) -> str:
    there = dict.fromkeys(itertools.chain.from_iterable(rows))
    for name in names:
        if name in there:
            return name
    raise DataError(f"expected a column {' or '.join(names)} in {path}, got {', '.join(map(str, there)) or 'no row'}.")


def _verdict(row: Mapping[Any, Any], model: str, instruction: str, preference: str) -> Verdict | str:
    """Read one row, or say why it cannot be used."""
    if _absent(row.get(model)) or _absent(row.get(instruction)):
        return "no model or no instruction"
    said = _number(row.get(preference))
    if said == 0:
        said = 1.5  # AlpacaEval's other way to write a draw
    if said is None or not 1 <= said <= 2:
        return "preference is no number from 1 to 2"
    base, own = _length(row, 1), _length(row, 2)
    longer = None if base is None or own is None else own - base
    return Verdict(str(row[model]), str(row[instruction]), said - 1, longer, own)


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _length(row: Mapping[Any, Any], side: int) -> float | None:
    said = row.get(f"output_{side}")
    return _number(row.get(f"len_output_{side}", len(said) if isinstance(said, str) else None))


def read_difficulties(path: Path) -> dict[str, float]:
    """Read difficulties of instructions: a CSV whose first column names the instruction as the annotations do.

    The second is its difficulty; so does AlpacaEval's instruction_difficulty.csv. Raises DataError if there is none.
    """
    rows = (list(row.values())[:2] for row in _rows(path))
    known = {str(row[0]): number for row in rows if len(row) == 2 and (number := _number(row[1])) is not None}
    if not known:
        raise DataError(f"expected instruction and difficulty as the first two columns of {path}, got no such row.")
    return known


def win_rates(
    verdicts: Iterable[Verdict],
    *,
    difficulties: Mapping[str, float] | None = None,
) -> dict[str, WinRate]:
    """Measure every model, by name. `difficulties`: of the instructions, where the official ones are at hand."""
    of: dict[str, list[Verdict]] = {}
    won: dict[str, list[float]] = {}
    for verdict in verdicts:
        of.setdefault(verdict.model, []).append(verdict)
        won.setdefault(verdict.instruction, []).append(verdict.won)
    if difficulties is not None and not difficulties.keys() & won.keys():
        raise DataError(
            f"expected difficulties of instructions such as {next(iter(won), '')[:40]!r}, got none of them but "
            f"{next(iter(difficulties), '')[:40]!r}. Name instructions as the annotations do."
        )
    return {
        model: _measure(its, standardised(its, others_on(its, won) if difficulties is None else difficulties))
        for model, its in sorted(of.items())
    }


def _measure(its: Sequence[Verdict], hard: np.ndarray) -> WinRate:
    won, n = np.array([verdict.won for verdict in its]), len(its)
    wins, draws, losses = (int(count) for count in ((won > 0.5).sum(), (won == 0.5).sum(), (won < 0.5).sum()))
    lengths = [verdict.length for verdict in its if verdict.length is not None]
    longer = np.array([np.nan if verdict.longer is None else verdict.longer for verdict in its])
    level, error = length_controlled(won, longer, hard)
    return WinRate(
        float(100 * won.mean()), float(100 * won.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        None if level is None else 100 * level, None if error is None else 100 * error,
        100 * (wins + draws / 2) / n, wins, draws, losses, n, float(np.mean(lengths)) if lengths else None,
    )  # fmt: skip


def others_on(its: Sequence[Verdict], won: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Say how easy a model's instructions are: the mean result of the other models on each.

    `won`: all models' results on an instruction. The model's own is left out: it would explain itself.
    """
    return {
        verdict.instruction: (math.fsum(results) - verdict.won) / (len(results) - 1)
        for verdict in its
        if len(results := won[verdict.instruction]) > 1
    }


def standardised(its: Sequence[Verdict], known: Mapping[str, float]) -> np.ndarray:
    """Lay out what is known of a model's instructions with mean 0 and deviation 1; 0 where nothing is known."""
    found = np.array([known.get(verdict.instruction, np.nan) for verdict in its])
    spread = np.nanstd(found) if np.isfinite(found).any() else 0.0
    return np.nan_to_num((found - np.nanmean(found)) / spread) if spread else np.zeros(len(its))


def as_text(found: Annotations, measured: Mapping[str, WinRate]) -> str:
    """Lay the rates out for a terminal, best first."""

    def best_first(model: str) -> float:
        rate = measured[model]
        return -(rate.win_rate if rate.length_controlled_win_rate is None else rate.length_controlled_win_rate)

    grid = [["", "n", "win rate %", "length-controlled %", "mean length"]]
    for model in sorted(measured, key=best_first):
        rate = measured[model]
        plain = spell(rate.win_rate, rate.win_rate_stderr)
        controlled = spell(rate.length_controlled_win_rate, rate.length_controlled_win_rate_stderr)
        grid.append([model, str(rate.n), plain, controlled, spell(rate.mean_length, form=".0f")])
    against = f"Against {found.baseline}; " if found.baseline else ""
    notes = [f"{against}± is one standard error."]
    notes += [f"{count} row(s) set aside: {reason}." for reason, count in found.set_aside.items()]
    return "\n".join([*in_columns(grid), *notes])
