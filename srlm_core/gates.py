"""gates: whether M_t keeps to the limits of `gates`, measured from the campaign's files and kept beside them.

What could not be measured is null, with the reason: it neither passes nor fails, and is counted by itself.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import store, summary, weights
from srlm_core.config import GatesConfig, RunConfig
from srlm_core.counting import read_iteration
from srlm_core.rates import Rate, rate
from srlm_core.spelling import spell

UNKNOWN = Rate(None, None, 0)
COUNTED = ("min_readable_rate", "max_tie_rate", "min_pairs_yield")
"""Limits on everything that an iteration made; the others are on samples."""
UNIT = {"min_win_rate": 1.0, "max_capability_drop": 100.0}
"""What one answer of n can move, times n: the error is at least that, as that of n equal values is 0."""


class Gate(NamedTuple):
    """One gate, and how a model met it."""

    name: str
    value: float | None
    stderr: float | None
    n: int
    limit: float | None
    """Null for `goodhart`, which has none."""
    passed: bool | None
    """Null where it was not measured."""
    note: str
    """Why it was not measured; of `goodhart`, what the own scores did meanwhile."""

    @property
    def setting(self) -> str:
        """The setting that asks for it."""
        return f"gates.{next(name for name in GatesConfig.model_fields if name.endswith(self.name))}"

    @property
    def bound(self) -> str:
        """The limit with its direction: `at most 0.5`."""
        direction = "at least" if ".min_" in self.setting else "at most"
        return "" if self.limit is None else f"{direction} {self.limit:g}"

    def __str__(self) -> str:
        """Spell it: `tie_rate 0.62 ± 0.03 (n = 64), at most 0.5`."""
        limit = f", {self.bound}" if self.bound else ""
        return f"{self.name} {spell(self.value, self.stderr, self.n)}{limit}" + (f" ({self.note})" if self.note else "")


def verdict(gates: Sequence[Gate]) -> bool | None:
    """Say whether a model passed: at least one gate was measured and none failed. None where none was measured."""
    measured = [gate.passed for gate in gates if gate.passed is not None]
    return all(measured) if measured else None


def in_words(gates: Sequence[Gate]) -> str:
    """Count them: `3 of 5 gates passed, 1 failed: tie_rate 0.62 ± 0.03 (n = 64), at most 0.5, 1 not measured: …`."""
    failed = [str(gate) for gate in gates if gate.passed is False]
    unknown: defaultdict[str, list[str]] = defaultdict(list)
    for gate in gates:
        if gate.passed is None:
            unknown[gate.note].append(gate.name)
    why = "; ".join(f"{', '.join(names)} ({note})" for note, names in unknown.items())
    told = [f"{sum(gate.passed is True for gate in gates)} of {len(gates)} gates passed"]
    told += [f"{len(failed)} failed: {'; '.join(failed)}"] if failed else []
    told += [f"{sum(map(len, unknown.values()))} not measured: {why}"] if unknown else []
    return ", ".join(told)


# --- measured -------------------------------------------------------------------------------------------------------


def measure(folder: Path, t: int, config: RunConfig, win_rate: Rate = UNKNOWN) -> list[Gate]:
    """Hold M_t against every gate that is set. `win_rate`: its share of points against M_t-1."""
    limits, model = config.gates, f"M{t}"
    makes = t <= config.iterations
    made = _made(folder, t, config) if makes else {}
    found = {
        "min_readable_rate": partial(_read, made, "judgments/readable_rate"),
        "max_tie_rate": partial(_read, made, "judgments/tie_rate"),
        "min_pairs_yield": partial(_read, made, "pairs/yield"),
        "max_length_growth": partial(length_growth, folder, model),
        "min_win_rate": lambda: win_rate,
        "max_capability_drop": partial(capability_drop, folder, model, config.evaluation.suites.capability),
    }
    held = [
        hold(setting, look() if setting in COUNTED or t > 1 else UNKNOWN, limit, _why_not(setting, t, makes=makes))
        for setting, look in found.items()
        if (limit := getattr(limits, setting)) is not None
    ]
    return [*held, goodhart(folder, t, config)] if limits.goodhart else held


def hold(setting: str, found: Rate, limit: float, why_not: str) -> Gate:
    """Hold a number against its limit: a count by itself, a sample by two standard errors.

    0.46 ± 0.03 keeps to at least 0.5, 0.42 ± 0.03 does not.
    """
    name = setting.partition("_")[2]
    if found.value is None or (setting not in COUNTED and found.stderr is None):
        why_not = why_not if found.value is None else "one value has no error that could be told"
        return Gate(name, found.value, None, found.n, limit, None, why_not)
    past = limit - found.value if setting.startswith("min_") else found.value - limit
    room = 0.0 if setting in COUNTED else 2 * max(found.stderr or 0.0, UNIT.get(setting, 0.0) / found.n)
    return Gate(name, *found, limit, past <= room, "")


def _why_not(setting: str, t: int, *, makes: bool) -> str:
    if setting in COUNTED:
        return "the iteration made nothing that it counts" if makes else f"M{t} is the last model and makes no data"
    return "not measured of both models" if t > 1 else "M1 is the first: it is held against nothing"


def _made(folder: Path, t: int, config: RunConfig) -> dict[str, float]:
    return summary.counted_metrics(read_iteration(folder, t, config))


def _read(metrics: Mapping[str, float], name: str) -> Rate:
    return Rate(metrics.get(name), metrics.get(f"{name}_stderr"), int(metrics.get(f"{name}_n", 0)))


def length_growth(folder: Path, model: str) -> Rate:
    """Return the mean tokens of a model's answers over that of M1's to the same prompts; n counts prompts.

    The error is that of a ratio of paired means (Cochran, Sampling Techniques, 6.4). 10 and 20 tokens, then 20 and 25:
    1.5 ± 0.25.
    """
    before, after = _lengths(folder, "M1"), _lengths(folder, model)
    both = [(before[prompt], after[prompt]) for prompt in before if prompt in after]
    mean = rate([float(old) for old, _ in both]).value
    if not mean:
        return UNKNOWN
    ratio = math.fsum(new for _, new in both) / math.fsum(old for old, _ in both)
    stderr = rate([new - ratio * old for old, new in both]).stderr
    return Rate(ratio, None if stderr is None else stderr / mean, len(both))


def _lengths(folder: Path, model: str) -> dict[str, int]:
    rows = _part(folder, model, "responses", ("prompt_id", "n_tokens"))
    return {prompt: n_tokens for prompt, n_tokens in rows if n_tokens is not None}


def capability_drop(folder: Path, model: str, tasks: Sequence[str]) -> Rate:
    """Return how far a model lies below M1 in percentage points, a mean over the tasks; n counts questions.

    A question counts by the mean of its figures (accuracy and the like, 0 to 1), and only where both models took it.
    """
    falls = [rate(_falls(folder, model, task)) for task in tasks]
    if any(fall.value is None for fall in falls):
        return UNKNOWN
    errors = [fall.stderr for fall in falls if fall.stderr is not None]
    stderr = 100 * math.hypot(*errors) / len(falls) if len(errors) == len(falls) else None
    points = 100 * math.fsum(fall.value or 0.0 for fall in falls) / len(falls)
    return Rate(points, stderr, sum(fall.n for fall in falls))


def _falls(folder: Path, model: str, task: str) -> list[float]:
    columns = ("task", "doc", "metric", "value")
    before, after = (
        {tuple(row[:3]): row[3] for row in _part(folder, of, f"capability_{task}", columns) if row[3] is not None}
        for of in ("M1", model)
    )
    of_question: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for (name, doc, metric), value in before.items():
        if (name, doc, metric) in after:
            of_question[name, doc].append(value - after[name, doc, metric])
    return [math.fsum(found) / len(found) for found in of_question.values()]


def _part(folder: Path, model: str, name: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Read what was measured of a model's present weights, a row at a time; nothing where that is not there."""
    if summary.evaluation_results(folder, model) is None:
        return []
    try:
        rows = store.read_part(store.part_path(folder / "evaluation" / model / name, 0)).select(list(columns))
    except (OSError, pa.ArrowException):
        return []
    return list(zip(*(rows[column].to_pylist() for column in columns), strict=True))


def goodhart(folder: Path, t: int, config: RunConfig) -> Gate:
    """Compare M_t with M_t-1: does it praise itself more while it agrees less with people?

    The value is the change of the held-out pairwise accuracy. Both models order the same held-out responses, so the
    error of independent ones is on the safe side.
    """
    if t == 1 or t > config.iterations:
        why = "M1 is the first: it is held against nothing" if t == 1 else f"M{t} is the last model and makes no data"
        return Gate("goodhart", None, None, 0, None, None, why)
    own = _change(*(_read(_made(folder, s, config), "judgments/score_mean") for s in (t - 1, t)))
    accuracy = "evaluation/judge_pairwise_accuracy"
    right = _change(*(_read(summary.model_metrics(folder, f"M{s}"), accuracy) for s in (t - 1, t)))
    if own.value is None or own.stderr is None or right.value is None or right.stderr is None:
        lacking = "the agreement with people's ranks" if own.stderr is not None else "its own scores"
        return Gate("goodhart", right.value, right.stderr, right.n, None, None, f"{lacking}: no change could be told")
    praise = f"accuracy against people; own scores {spell(own.value, own.stderr, own.n, form='+.2f')}"
    return Gate("goodhart", *right, None, not (own.value > own.stderr and -right.value > right.stderr), praise)


def _change(before: Rate, after: Rate) -> Rate:
    if before.value is None or after.value is None:
        return UNKNOWN
    known = before.stderr is not None and after.stderr is not None
    stderr = math.hypot(before.stderr or 0.0, after.stderr or 0.0) if known else None
    return Rate(after.value - before.value, stderr, after.n)


# --- kept -----------------------------------------------------------------------------------------------------------


def keep(folder: Path, t: int, config: RunConfig, digest: str, gates: Sequence[Gate]) -> None:
    """Write what M_t, of these weights, came to: beside what it makes; of the last model, beside its measurements."""
    beside = _homes(folder, t)[0 if t <= config.iterations else 1]
    store.write_json(beside, {"model": f"M{t}", "digest": digest, "gates": [gate._asdict() for gate in gates]})


def forget(folder: Path, t: int) -> None:
    """Delete what earlier limits came to: none is set any more."""
    for kept in _homes(folder, t):
        kept.unlink(missing_ok=True)


def read(folder: Path) -> dict[int, list[Gate]]:
    """Read the gates of every M_t that is still what they were asked of, by t."""
    found: dict[int, list[Gate]] = {}
    for t in range(1, len(list(folder.glob("models/M*"))) + 1):
        marker = weights.marker(folder, f"M{t}") or {}
        for kept in map(store.read_json, _homes(folder, t)):
            if kept is not None and kept["digest"] == marker.get("digest"):
                found.setdefault(t, [Gate(**gate) for gate in kept["gates"]])
    return found


def _homes(folder: Path, t: int) -> tuple[Path, Path]:
    return folder / f"iter_{t:02d}" / "gates.json", folder / "evaluation" / f"M{t}" / "gates.json"
