"""counting: one pass over the Parquet parts of an iteration, one shard in memory at a time.

A part that cannot be read is named, and nothing of it is counted.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import judgments, responses, store
from srlm_core.config import RunConfig

SURPLUS = "over_target"
"""Drop reason of a prompt that passed every filter when enough were kept already: no failure."""


@dataclass
class Mean:
    """Mean and standard error of numbers that are seen once and not kept."""

    n: int = 0
    _mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        """Take one number in (Welford: no loss of digits however many there are)."""
        self.n += 1
        step = value - self._mean
        self._mean += step / self.n
        self._squares += step * (value - self._mean)

    @property
    def value(self) -> float | None:
        return self._mean if self.n else None

    @property
    def stderr(self) -> float | None:
        return math.sqrt(self._squares) / self.n if self.n else None


@dataclass
class IterationCounts:
    """What the files of one iteration add up to; its size does not depend on their number of rows."""

    prompts: int = 0
    drops: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(stage, reason) to count."""
    tokens: Mean = field(default_factory=Mean)
    chars: Mean = field(default_factory=Mean)
    truncated: Mean = field(default_factory=Mean)
    readable: Mean = field(default_factory=Mean)
    unreadable: Counter[str] = field(default_factory=Counter)
    histogram: Counter[int] = field(default_factory=Counter)
    """Rubric point to readable verdicts, rounded."""
    score: Mean = field(default_factory=Mean)
    spread: Mean = field(default_factory=Mean)
    score_and_length: Counter[tuple[float, int]] = field(default_factory=Counter)
    """(score to a hundredth, tokens) to responses: all that a rank correlation needs."""
    pairs: int = 0
    """Pairs of responses."""
    judgment_pairs: int = 0
    paired_prompts: int = 0
    margin: Mean = field(default_factory=Mean)
    chosen_tokens: Mean = field(default_factory=Mean)
    rejected_tokens: Mean = field(default_factory=Mean)
    damaged: list[Path] = field(default_factory=list)
    """Parts that could not be read; the same command makes them again."""

    @property
    def to_be_paired(self) -> int:
        """Prompts that the pairs stage has seen."""
        return self.paired_prompts + sum(count for (stage, _), count in self.drops.items() if stage == "pairs")


def read_iteration(folder: Path, t: int, config: RunConfig | None) -> IterationCounts:
    """Count iteration t. `config` says how many passes make a score (None: as many as there are, the half required)."""
    root = folder / f"iter_{t:02d}"
    seen = tuple(
        (path, status.st_mtime_ns, status.st_size, status.st_ino)
        for dataset in (*_COLUMNS, "drops")
        for path in store.parts(root / dataset)
        for status in [path.stat()]
    )
    return _counted(root, (config.judgments.k, config.judgments.required) if config else None, seen)


@lru_cache(maxsize=32)
def _counted(root: Path, passes: tuple[int, int] | None, seen: tuple[Any, ...]) -> IterationCounts:
    """Count what is in a folder; `seen` are its parts as they are now: an iteration is read once until one changes."""
    counts = IterationCounts()
    names = sorted({path.name for dataset in _COLUMNS for path in store.parts(root / dataset)})
    for name in names:
        shard = {dataset: _read(root / dataset / name, columns, counts) for dataset, columns in _COLUMNS.items()}
        lengths: dict[str, int] = {}
        if shard["prompts"] is not None:
            counts.prompts += shard["prompts"].num_rows
        if shard["responses"] is not None:
            lengths = _count_responses(counts, shard["responses"])
        if shard["judgments"] is not None:
            _count_judgments(counts, shard["judgments"], lengths, passes)
        lengths |= {name: n for of in _BESIDE for name, n in _lengths(shard[of])}
        if shard["pairs"] is not None:
            _count_pairs(counts, shard["pairs"], lengths)
    counts.drops = count_drops(root / "drops", counts.damaged)
    return counts


_BESIDE = responses.DATASETS[1:]
_COLUMNS = {
    **dict.fromkeys(_BESIDE, ("response_id", "n_tokens")),
    "prompts": ("prompt_id",),
    "responses": ("response_id", "response", "n_tokens", "finish_reason"),
    "judgments": ("target_id", "index", "form", "verdict", "unreadable_reason"),
    "pairs": ("prompt_id", "kind", "chosen_id", "rejected_id", "chosen_score", "rejected_score", "label"),
}


def read_columns(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read some columns of a part, page checksums verified: the judges' texts stay on the disk."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=None if columns is None else list(columns))


def _read(path: Path, columns: Sequence[str], counts: IterationCounts) -> pa.Table | None:
    if not path.exists():
        return None
    try:
        return read_columns(path, columns)
    except (OSError, pa.ArrowException):
        counts.damaged.append(path)
        return None


def _count_responses(counts: IterationCounts, rows: pa.Table) -> dict[str, int]:
    """Count what models wrote: a reference has no tokens of theirs."""
    lengths: dict[str, int] = {}
    columns = (rows[name].to_pylist() for name in ("response_id", "n_tokens", "response", "finish_reason"))
    for response_id, n_tokens, text, reason in zip(*columns, strict=True):
        if n_tokens is not None:
            lengths[response_id] = n_tokens
            counts.tokens.add(n_tokens)
            counts.chars.add(len(text))
            counts.truncated.add(float(reason == "length"))
    return lengths


def _lengths(rows: pa.Table | None) -> list[tuple[str, int]]:
    """List (response, tokens): of what is in pairs, though the policy did not write it."""
    return [] if rows is None else list(zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True))


def _count_judgments(
    counts: IterationCounts, rows: pa.Table, lengths: Mapping[str, int], passes: tuple[int, int] | None
) -> None:
    made = 1 + max(rows["index"].to_pylist(), default=-1)
    k, required = passes or (made, (made + 1) // 2)
    rows = rows.filter(pa.array([index < k for index in rows["index"].to_pylist()], pa.bool_()))
    for verdict, reason in zip(rows["verdict"].to_pylist(), rows["unreadable_reason"].to_pylist(), strict=True):
        counts.readable.add(float(verdict is not None))
        if verdict is None:
            counts.unreadable[reason] += 1
    pointwise = rows.filter(pa.array([form == "pointwise" for form in rows["form"].to_pylist()], pa.bool_()))
    counts.histogram.update(round(value) for value in pointwise["verdict"].to_pylist() if value is not None)
    for target, score in judgments.scores(pointwise, k=k, required=required).items():
        counts.score.add(score.mean)
        if score.n > 1:
            counts.spread.add(math.sqrt(score.variance))
        if target in lengths:
            counts.score_and_length[round(score.mean, 2), lengths[target]] += 1


def _count_pairs(counts: IterationCounts, rows: pa.Table, lengths: Mapping[str, int]) -> None:
    found = rows.to_pylist()
    of_responses = [row for row in found if row["kind"] == "response"]
    counts.pairs += len(of_responses)
    counts.judgment_pairs += len(found) - len(of_responses)
    counts.paired_prompts += len({row["prompt_id"] for row in of_responses})
    for row in (row for row in of_responses if row["label"] is not None):  # else none is chosen
        if row["chosen_score"] is not None and row["rejected_score"] is not None:
            counts.margin.add(row["chosen_score"] - row["rejected_score"])
        for side, tally in (("chosen_id", counts.chosen_tokens), ("rejected_id", counts.rejected_tokens)):
            if row[side] in lengths:
                tally.add(lengths[row[side]])


def count_drops(folder: Path, damaged: list[Path]) -> Counter[tuple[str, str]]:
    """Count a folder of drops by stage and reason; unreadable parts are added to `damaged`."""
    found: Counter[tuple[str, str]] = Counter()
    for path in store.parts(folder):
        try:
            rows = read_columns(path, ("stage", "reason"))
        except (OSError, pa.ArrowException):
            damaged.append(path)
            continue
        found.update(zip(rows["stage"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    return found


def entropy_bits(histogram: Mapping[int, int]) -> float | None:
    """Return the entropy of a histogram: 0 where one point takes all, log2(6) = 2.58 where all six are equal."""
    total = sum(histogram.values())
    if not total:
        return None
    return -math.fsum(count / total * math.log2(count / total) for count in histogram.values() if count) + 0.0


def spearman(cells: Mapping[tuple[float, int], int]) -> float | None:
    """Return the rank correlation of (x, y) values that occur `count` times; None where one side is constant."""
    x, y = (_ranks(cells, side) for side in (0, 1))
    if len(x) < 2 or len(y) < 2:
        return None
    middle = (sum(cells.values()) + 1) / 2
    centred = [(x[a] - middle, y[b] - middle, count) for (a, b), count in cells.items()]
    both = math.fsum(dx * dy * count for dx, dy, count in centred)
    xx, yy = (
        math.fsum(dx * dx * count for dx, _, count in centred),
        math.fsum(dy * dy * count for _, dy, count in centred),
    )
    return both / math.sqrt(xx * yy)


def _ranks(cells: Mapping[tuple[float, int], int], side: int) -> dict[float, float]:
    """Average rank of each distinct value of one side."""
    sizes: Counter[float] = Counter()
    for cell, count in cells.items():
        sizes[cell[side]] += count
    ranks: dict[float, float] = {}
    before = 0
    for value in sorted(sizes):
        ranks[value] = before + (sizes[value] + 1) / 2
        before += sizes[value]
    return ranks
