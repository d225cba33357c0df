"""summary: a campaign folder read into numbers, for the report, for MLflow and Prefect, and for the console.

Nothing is computed twice: evaluation numbers come from results.json, the others from one pass over the Parquet parts.
A number that is not known is left out, never zero.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from srlm_core import schemas, store, weights
from srlm_core.config import RunConfig
from srlm_core.counting import SURPLUS, IterationCounts, Mean, entropy_bits, read_iteration, spearman

BASE, BASELINE = "M0", "sft_baseline"
SAMPLES, LONGEST = 5, 500
"""Rows of a sample, and characters of a text in it."""


def campaign_config(folder: Path) -> RunConfig | None:
    """Read a campaign's settings; None where config.json is absent, damaged or of another version."""
    raw = store.read_json(folder / "config.json")
    try:
        return None if raw is None else RunConfig.model_validate(raw)
    except ValidationError:
        return None


def models(folder: Path) -> list[str]:
    """List the models of a campaign: M0, sft_baseline, M1, M2, … and then others that were evaluated, by name.

    A model that was trained on the way, for a later step to ask, is none of them.
    """
    trained = {path.parent.name for path in folder.glob(f"models/*/{weights.MARKER}")}
    found = {BASE} | {name for name in trained if name == BASELINE or re.fullmatch(r"M\d+", name)}
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


# --- metrics ----------------------------------------------------------------------------------------------------------


def iteration_metrics(folder: Path, t: int) -> dict[str, float]:
    """Measure the datasets of iteration t, made with M_t, and the training of M_{t+1} on them."""
    counts = read_iteration(folder, t, campaign_config(folder))
    return counted_metrics(counts) | method_metrics(folder, t) | training_metrics(folder, f"M{t + 1}")


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
        "pairs/n_of_judgments": float(counts.judgment_pairs) if counts.judgment_pairs else None,
        **_share("pairs/yield", counts.paired_prompts, counts.to_be_paired),
        "pairs/margin_mean": counts.margin.value,
        "pairs/chosen_length_tokens_mean": counts.chosen_tokens.value,
        "pairs/rejected_length_tokens_mean": counts.rejected_tokens.value,
    }
    return _known(found)


def sample_pairs(folder: Path, t: int) -> list[dict[str, Any]]:
    """Return the first pairs of iteration t for a table, long texts cut and marked so."""
    return [
        {
            "prompt": _cut(schemas.prompt_text(row["messages"])),
            "chosen": _cut(row["chosen"]), "chosen score": _short(row["chosen_score"]),
            "rejected": _cut(row["rejected"]), "rejected score": _short(row["rejected_score"]),
            "label": _short(row["label"]), "pair": row["pair_id"],
        }
        for path in store.parts(folder / f"iter_{t:02d}" / "pairs")[:1]
        for row in store.read_part(path).slice(0, SAMPLES).to_pylist()
    ]  # fmt: skip


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def method_metrics(folder: Path, t: int) -> dict[str, float]:
    """Name what the method measured of iteration t by itself, as `method/…`."""
    found: dict[str, float | None] = {}
    for name, told in method_measures(folder, t).items():
        found[f"method/{name}"], found[f"method/{name}_stderr"] = told["value"], told["stderr"]
        found[f"method/{name}_n"] = float(told["n"])
    return _known(found)


def method_measures(folder: Path, t: int) -> dict[str, dict[str, Any]]:
    """Read what the method measured of iteration t: name to label, value, stderr and n."""
    return store.read_json(folder / f"iter_{t:02d}" / "measures.json") or {}


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
    marker = weights.marker(folder, model) or {}
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
    "agreement": "scir/agreement",
    "masked": "scir/masked",
    "order_flips": "scir/order_flips",
    "generative_confidence": "scir/generative_confidence",
    "implicit_confidence": "scir/implicit_confidence",
    "divergence": "scir/divergence",
    "entropy_of_rewards": "scir/entropy",
}
"""Our names for what TRL logs, and our losses (engines/losses.py)."""


def _rows_of(path: Path) -> float | None:
    try:
        return float(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return None


def evaluation_results(folder: Path, model: str) -> dict[str, Any] | None:
    """Read a model's results.json; None where there is none, or it is about weights that have been replaced."""
    results = store.read_json(folder / "evaluation" / model / "results.json")
    marker = weights.marker(folder, model)
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


# --- the whole campaign -----------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """A campaign in numbers."""

    config: RunConfig | None
    models: list[str]
    iterations: dict[int, IterationCounts]
    of_iteration: dict[int, dict[str, float]]
    of_model: dict[str, dict[str, float]]
    labels: dict[str, str]
    """What the method's own measures are called, by metric."""
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
        {
            t: counted_metrics(counts) | method_metrics(folder, t) | training_metrics(folder, f"M{t + 1}")
            for t, counts in counted.items()
        },
        {model: model_metrics(folder, model) for model in models(folder)},
        {f"method/{name}": told["label"] for t in counted for name, told in method_measures(folder, t).items()},
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
    trained = [model for model in [BASELINE, *policies] if (folder / "models" / model / weights.MARKER).exists()]
    lacking += [f"iteration {t} has not begun" for t in range(1, config.iterations + 1) if t not in counted]
    lacking += [f"{model} is not trained yet" for model in [BASELINE, *policies] if model not in trained]
    if config.evaluation.models == "none":
        return lacking
    wanted = policies if config.evaluation.models == "policy" else [BASE, BASELINE, *policies]
    lacking += [f"{model} is not evaluated yet" for model in wanted if evaluation_results(folder, model) is None]
    if config.evaluation.head_to_head and not head_to_heads(folder)[1]:
        lacking.append("the models have not met head to head yet")
    return lacking
