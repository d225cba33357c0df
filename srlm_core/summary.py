"""summary: a campaign folder read into numbers, for the report, for MLflow and Prefect, and for the console.

Nothing is computed twice: evaluation numbers come from results.json, the others from one pass over the Parquet parts,
one shard in memory at a time. A number that is not known is left out (or None in the table), never zero.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from srlm_core import judgments, store
from srlm_core.config import RunConfig
from srlm_core.spelling import in_columns, spell

BASE, BASELINE = "M0", "sft_baseline"
SURPLUS = "over_target"
"""Drop reason of a prompt that passed every filter when enough were kept already: no failure."""


def campaign_config(folder: Path) -> RunConfig | None:
    """Read a campaign's settings; None where config.json is absent, damaged or of another version."""
    raw = store.read_json(folder / "config.json")
    try:
        return None if raw is None else RunConfig.model_validate(raw)
    except ValidationError:
        return None


def models(folder: Path) -> list[str]:
    """List the models of a campaign: M0, sft_baseline, M1, M2, … and then others that were evaluated, by name."""
    found = {BASE}
    found |= {path.parent.name for path in folder.glob("models/*/complete.json")}
    found |= {path.parent.name for path in folder.glob("evaluation/*/results.json")} - {"head_to_head", "votes"}
    return sorted(found, key=_place)


def _place(model: str) -> tuple[int, int, str]:
    if model in (BASE, BASELINE):
        return (0, model == BASELINE, "")
    number = re.fullmatch(r"M(\d+)", model)
    return (1, int(number[1]), "") if number else (2, 0, model)


def iterations(folder: Path) -> list[int]:
    """List the iterations that have begun."""
    found = (re.fullmatch(r"iter_(\d+)", path.name) for path in folder.glob("iter_*"))
    return sorted(int(match[1]) for match in found if match)


# --- one pass over an iteration -------------------------------------------------------------------------------------


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


def read_iteration(folder: Path, t: int, config: RunConfig | None = None) -> IterationCounts:
    """Count iteration t, one shard in memory at a time. `config` says which passes make a score (None: read it)."""
    config = config or campaign_config(folder)
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
        if shard["pairs"] is not None:
            _count_pairs(counts, shard["pairs"], lengths)
    counts.drops = count_drops(root / "drops", counts.damaged)
    return counts


_COLUMNS = {
    "prompts": ("prompt_id",),
    "responses": ("response_id", "response", "n_tokens", "finish_reason"),
    "judgments": ("target_id", "index", "form", "verdict", "unreadable_reason"),
    "pairs": ("prompt_id", "chosen_id", "rejected_id", "chosen_score", "rejected_score"),
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
    tokens = rows["n_tokens"].to_pylist()
    for n_tokens, text, reason in zip(
        tokens, rows["response"].to_pylist(), rows["finish_reason"].to_pylist(), strict=True
    ):
        counts.tokens.add(n_tokens)
        counts.chars.add(len(text))
        counts.truncated.add(float(reason == "length"))
    return dict(zip(rows["response_id"].to_pylist(), tokens, strict=True))


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
    counts.pairs += rows.num_rows
    counts.paired_prompts += len(set(rows["prompt_id"].to_pylist()))
    for row in rows.to_pylist():
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


# --- metrics --------------------------------------------------------------------------------------------------------


def iteration_metrics(folder: Path, t: int) -> dict[str, float]:
    """Measure the datasets of iteration t, made with M_t, and the training of M_{t+1} on them."""
    return counted_metrics(read_iteration(folder, t)) | training_metrics(folder, f"M{t + 1}")


def counted_metrics(counts: IterationCounts) -> dict[str, float]:
    """Name what was counted. What passed the prompt filters but was not needed is in no rate."""
    dropped = {reason: count for (stage, reason), count in counts.drops.items() if stage == "prompts"}
    refused = sum(count for reason, count in dropped.items() if reason != SURPLUS)
    found: dict[str, float | None] = {
        "prompts/kept": float(counts.prompts),
        **_share("prompts/yield", counts.prompts, counts.prompts + refused),
        **{f"prompts/dropped_{reason}": float(count) for reason, count in sorted(dropped.items())},
        "responses/n": float(counts.tokens.n),
        "responses/length_tokens_mean": counts.tokens.value,
        "responses/length_chars_mean": counts.chars.value,
        **_mean("responses/truncated_rate", counts.truncated),
        **_mean("judgments/readable_rate", counts.readable),
        **_mean("judgments/score_mean", counts.score),
        "judgments/score_entropy": entropy_bits(counts.histogram),
        "judgments/spread_over_passes": counts.spread.value,
        "judgments/score_length_correlation": spearman(counts.score_and_length),
        **_share("judgments/tie_rate", counts.drops["pairs", "tie"], counts.to_be_paired),
        "pairs/n": float(counts.pairs),
        **_share("pairs/yield", counts.paired_prompts, counts.to_be_paired),
        "pairs/margin_mean": counts.margin.value,
        "pairs/chosen_length_tokens_mean": counts.chosen_tokens.value,
        "pairs/rejected_length_tokens_mean": counts.rejected_tokens.value,
    }
    return _known(found)


def _mean(name: str, mean: Mean) -> dict[str, float | None]:
    return {name: mean.value, f"{name}_stderr": mean.stderr, f"{name}_n": float(mean.n)}


def _share(name: str, part: int, whole: int) -> dict[str, float | None]:
    share = part / whole if whole else None
    stderr = None if share is None else math.sqrt(share * (1 - share) / whole)
    return {name: share, f"{name}_stderr": stderr, f"{name}_n": float(whole)}


def _known(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def training_folder(folder: Path, model: str) -> Path | None:
    """Return where a model's training left its log: under bootstrap for M1 and sft_baseline, else in its iteration."""
    if model in (BASELINE, "M1"):
        return folder / "bootstrap" / "training" / model
    number = re.fullmatch(r"M(\d+)", model)
    return folder / f"iter_{int(number[1]) - 1:02d}" / "training" if number and int(number[1]) > 1 else None


def training_curve(folder: Path, model: str) -> list[dict[str, Any]]:
    """Read a training's log, one row per step (and per held-out check); empty where there is none."""
    work_dir = training_folder(folder, model)
    if work_dir is None or not (work_dir / "log.parquet").exists():
        return []
    try:
        return store.read_part(work_dir / "log.parquet").to_pylist()
    except (OSError, pa.ArrowException):
        return []


def training_metrics(folder: Path, model: str) -> dict[str, float]:
    """Measure the training that made a model; its values at the end are means over the last tenth of the steps."""
    curve = training_curve(folder, model)
    losses = [row["loss"] for row in curve if row.get("loss") is not None]
    found: dict[str, float | None] = {"training/loss_first": losses[0] if losses else None}
    for name, column in _TRAINING.items():
        values = [row[column] for row in curve if row.get(column) is not None]
        last = values[-math.ceil(len(values) / 10) :] if values else []
        found[f"training/{name}"] = math.fsum(last) / len(last) if last else None
    marker = store.read_json(folder / "models" / model / "complete.json") or {}
    found["training/n_rows"], found["training/steps"] = marker.get("rows"), marker.get("steps")
    found["training/seconds"] = marker.get("seconds")
    work_dir = training_folder(folder, model)
    if marker and work_dir is not None:
        root = work_dir.parents[1] if model in (BASELINE, "M1") else work_dir.parent
        found["training/dropped"] = _rows_of(root / "drops" / f"part-training-{model}.parquet")
    return _known(found)


_TRAINING = {
    "loss": "loss",
    "rewards_accuracy": "rewards/accuracies",
    "rewards_margin": "rewards/margins",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
    "heldout_loss": "eval_loss",
    "heldout_rewards_accuracy": "eval_rewards/accuracies",
}
"""Our names for what TRL logs."""


def _rows_of(path: Path) -> float | None:
    try:
        return float(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return None


def evaluation_results(folder: Path, model: str) -> dict[str, Any] | None:
    """Read a model's results.json; None where there is none, or it is about weights that have been replaced."""
    results = store.read_json(folder / "evaluation" / model / "results.json")
    marker = store.read_json(folder / "models" / model / "complete.json")
    stale = results is not None and marker is not None and results.get("digest") != marker["digest"]
    return None if stale else results


def head_to_heads(folder: Path) -> tuple[str | None, dict[tuple[str, str], dict[str, Any]]]:
    """Read the comparisons, (newer, older) to its tally, and who judged them; both models must have valid results."""
    results = store.read_json(folder / "evaluation" / "head_to_head" / "results.json") or {}
    measured = [model for model in models(folder) if evaluation_results(folder, model)]
    known = {f"{newer}_vs_{older}": (newer, older) for newer in measured for older in measured}
    compared = results.get("comparisons", {})
    return results.get("judge"), {known[name]: tally for name, tally in compared.items() if name in known}


def plays_itself(folder: Path) -> list[str]:
    """Name the compared models that the judge of the head-to-heads is one of."""
    return (store.read_json(folder / "evaluation" / "head_to_head" / "results.json") or {}).get("plays_itself") or []


def votes(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what people said of the models' answers: NEWER_vs_OLDER to its counts."""
    return (store.read_json(folder / "evaluation" / "votes" / "results.json") or {}).get("comparisons") or {}


def other_judges(folder: Path) -> list[dict[str, Any]]:
    """Read what further judges of the head-to-heads found: judge, comparisons, and their agreement with the first."""
    return (store.read_json(folder / "evaluation" / "head_to_head" / "results.json") or {}).get("other_judges") or []


def model_metrics(folder: Path, model: str) -> dict[str, float]:
    """Name what was measured of a model. A win rate counts a win 1 and a tie 1/2: 0.5 is even."""
    results = evaluation_results(folder, model)
    if results is None:
        return {}
    found: dict[str, float | None] = {}
    for name, rate in _rates(results):
        found[f"evaluation/{name}"], found[f"evaluation/{name}_stderr"] = rate["value"], rate["stderr"]
        found[f"evaluation/{name}_n"] = float(rate["n"])
    health = results.get("judge_health", {})
    found["evaluation/score_entropy"] = health.get("entropy_bits")
    found["evaluation/spread_over_passes"] = health.get("spread_over_passes")
    found["evaluation/score_length_correlation"] = health.get("score_length_correlation")
    answers = results.get("responses", {})
    found["evaluation/response_length_tokens_mean"] = answers.get("tokens_mean")
    found["evaluation/response_length_chars_mean"] = answers.get("chars_mean")
    found["evaluation/response_length_chars_p95"] = answers.get("chars_p95")
    for (newer, older), tally in head_to_heads(folder)[1].items():
        if newer == model:
            found |= _match_metrics(older, tally)
    return _known(found)


def _rates(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, rate in results.get("judge", {}).items():
        if isinstance(rate, Mapping):
            yield (name if name == "longer_accuracy" else f"judge_{name}"), rate
    for block, key, name in (
        ("judge_health", "readable_rate", "readable_rate"),
        ("judge_health", "score", "score_mean"),
        ("judge_health", "pass_agreement", "pass_agreement"),
        ("text_reading", "readable_rate", "text_readable_rate"),
        ("order", "first_preferred", "judge_first_preferred"),
        ("order", "better_preferred", "judge_better_preferred"),
        ("own_answers", "place", "own_answer_place"),
        ("own_answers", "place_by_judge", "own_answer_place_by_judge"),
        ("own_answers", "self_preference", "self_preference"),
        ("responses", "truncated", "response_truncated_rate"),
        ("responses", "repetition", "response_repetition"),
        ("responses", "refused", "response_refused_rate"),
        ("responses", "distinct_1", "response_distinct_1"),
        ("responses", "distinct_2", "response_distinct_2"),
        ("refusals", "harmful", "refused_harmful"),
        ("refusals", "harmless", "refused_harmless"),
        ("attacks", "shift", "attack_shift"),
    ):
        rate = results.get(block, {}).get(key)
        if rate:
            yield name, rate
    for suite, figures in results.get("suites", {}).items():
        told = {**figures, **figures.get("categories", {})}
        yield from ((f"{suite}_{key}", rate) for key, rate in told.items() if _is_rate(rate))


def _is_rate(found: Any) -> bool:
    return isinstance(found, Mapping) and found.keys() == {"value", "stderr", "n"}


def _match_metrics(other: str, tally: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    named = {"win_or_half_tie": "win_rate", "length_controlled": "length_controlled_win_rate"}
    for key in ("win_or_half_tie", "length_controlled", "win", "tie", "lose", "flip_rate", "longer"):
        name = named.get(key, key)
        if key in tally:
            found[f"evaluation/{name}_vs_{other}"] = tally[key]["value"]
            found[f"evaluation/{name}_vs_{other}_stderr"] = tally[key]["stderr"]
    found[f"evaluation/win_rate_vs_{other}_n"] = float(tally["win_or_half_tie"]["n"])
    return found


# --- the whole campaign ---------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """A campaign in numbers."""

    config: RunConfig | None
    models: list[str]
    iterations: dict[int, IterationCounts]
    of_iteration: dict[int, dict[str, float]]
    of_model: dict[str, dict[str, float]]
    missing: list[str]
    """What a finished campaign would have; empty for a finished one."""


def collect(folder: Path) -> Summary:
    """Read a campaign folder once."""
    config = campaign_config(folder)
    counted = {t: read_iteration(folder, t, config) for t in iterations(folder)}
    return Summary(
        config,
        models(folder),
        counted,
        {t: counted_metrics(counts) | training_metrics(folder, f"M{t + 1}") for t, counts in counted.items()},
        {model: model_metrics(folder, model) for model in models(folder)},
        _missing(folder, config, counted),
    )


def _missing(folder: Path, config: RunConfig | None, counted: Mapping[int, IterationCounts]) -> list[str]:
    lacking = [
        f"{path.relative_to(folder)} is damaged and was not counted; the same command makes it again"
        for counts in counted.values()
        for path in counts.damaged
    ]
    if config is None:
        return [
            *lacking,
            "config.json is absent or from another version, so what a finished campaign would hold is not known",
        ]
    policies = [f"M{t}" for t in range(1, config.iterations + 2)]
    trained = [model for model in [BASELINE, *policies] if (folder / "models" / model / "complete.json").exists()]
    lacking += [f"iteration {t} has not begun" for t in range(1, config.iterations + 1) if t not in counted]
    lacking += [f"{model} is not trained yet" for model in [BASELINE, *policies] if model not in trained]
    if config.evaluation.models == "none":
        return lacking
    wanted = policies if config.evaluation.models == "policy" else [BASE, BASELINE, *policies]
    lacking += [f"{model} is not evaluated yet" for model in wanted if evaluation_results(folder, model) is None]
    if config.evaluation.head_to_head and not head_to_heads(folder)[1]:
        lacking.append("the models have not met head to head yet")
    return lacking


# --- the table of iterations ----------------------------------------------------------------------------------------


def table(folder: Path) -> list[dict[str, Any]]:
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


def escape_markdown(text: str) -> str:
    """Make a text harmless on one line of Markdown: nothing in it is markup, a table cell or a tag."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~&$:@/\"'=])", r"\\\1", re.sub(r"\s+", " ", text)).strip()
