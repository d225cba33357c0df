"""cards: what a model and its datasets say of themselves to a stranger, from the campaign's own records alone."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from srlm_core import pages, publishing, recipes, report, settings, store
from srlm_core.config import DEMO_MODEL, RunConfig
from srlm_core.errors import ConfigError
from srlm_core.methods import METHODS
from srlm_core.weights import MARKER

Grid = Sequence[Sequence[str]]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LONGEST = 600
"""Characters of a text that a card shows."""
_BENCHMARKS = {
    "ifeval_prompt_level_strict_acc": ("IFEval", "google/IFEval", "accuracy"),
    "mt_bench_score": ("MT-Bench", "lmsys/mt_bench", "score"),
}
"""Measure to the benchmark's name, its dataset, and what kind of number it is."""


# --- a model --------------------------------------------------------------------------------------------------------


def lineage(folder: Path, model: str) -> list[dict[str, Any]]:
    """Trace a model back to M0 by the markers: the oldest first, each with what it was trained from and against."""
    found: list[dict[str, Any]] = []
    wanted: str | None = model
    while wanted:
        marker = store.read_json(folder / "models" / wanted / MARKER)
        if marker is None:
            known = [name for one in found for name in (one.get("init_from"), one.get("reference")) if name]
            digest = next((digest for name, digest in known if name == wanted), None)
            found.append({"model": wanted, "digest": digest})
            break
        found.append({"model": wanted, **marker})
        wanted = marker["init_from"][0]
    return found[::-1]


def model_card(folder: Path, config: RunConfig, model: str, base: Path | None, data_repo: str | None) -> ModelCard:
    """Write the card of a model. `base`: where M0 lies, if it is known; `data_repo`: where its datasets are pushed."""
    content = publishing.without_paths(folder, report.gather(folder, texts=False))
    found, method = content["to_draw"]["found"], METHODS[config.method]
    license_ = license_of(base)
    ancestors = lineage(folder, model)
    text = pages.markdown().get_template("model_card_template.md.j2").render(
        **{key: value for key, value in content.items() if key not in ("config", "lineage")},
        model=model, scripted=config.engine.kind == "scripted", base=_shown(config.model.path), license=license_,
        method=method, config=config, lineage=ancestors, differs=publishing.without_paths(folder, _differs(config)),
        by_model={
            about: _by_model(lines, found.models)
            for about, lines in (("As a judge", content["judges"]), ("Published benchmarks", content["suites"]),
                                 ("Its answers", content["answered"])) if lines
        },
        packages=_packages(folder), data_repo=data_repo,
        ift=_shown(config.seed_data.ift), eft=_shown(config.seed_data.eft),
    )  # fmt: skip
    data = ModelCardData(
        base_model=config.model.path if hub_id(config.model.path) else None,
        license=license_,
        datasets=[*_datasets_of(config), *([data_repo] if data_repo else [])] or None,
        library_name=None if config.engine.kind == "scripted" else "transformers",
        pipeline_tag="text-generation",
        tags=["self-rewarding", "srlm", config.method.replace("_", "-"), "trl"],
        model_name=f"{folder.name}-{model}",
        eval_results=_eval_results(found.of_model.get(model, {})) or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def hub_id(name: str) -> bool:
    """Whether a setting names a model or dataset of the hub, and nothing on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def license_of(base: Path | None) -> str | None:
    """Return the license that a base model names: in its card, or in the package that it came from; null if neither."""
    if base is None:
        return None
    card = base / "README.md"
    if card.is_file() and (named := (metadata_load(card) or {}).get("license")):
        return str(named)
    package = (store.read_json(base / "source.json") or {}).get("package")
    try:
        named = metadata(package).json.get("license") if package else None
    except PackageNotFoundError:
        return None
    return named.lower() if isinstance(named, str) and re.fullmatch(r"[\w.-]+", named) else None


def _shown(path: str) -> str:
    return path if path == DEMO_MODEL or hub_id(path) else Path(path).name


def _datasets_of(config: RunConfig) -> list[str]:
    named = (config.seed_data.ift, config.seed_data.eft, config.prompts.file or "")
    return [name for name in dict.fromkeys(named) if hub_id(name)]


def _differs(config: RunConfig) -> list[tuple[str, str, str]]:
    """List the settings that are not the recipe's: name, there, here."""
    try:
        usual = settings.flat(recipes.load(config.recipe, config.size))
    except ConfigError:  # a recipe of the user's own
        usual = settings.flat(RunConfig())
    here = settings.flat(config)
    said = [
        (name, str(usual.get(name, "–")), str(value))
        for name, value in here.items()
        if usual.get(name) != value and not name.startswith(("tracking.", "storage.")) and name != "engine.dtype"
    ]
    return [
        (name, there, Path(value).name if "/" in value and Path(value).exists() else value)
        for name, there, value in said
    ]


def _by_model(lines: Sequence[Mapping[str, str]], models: Sequence[str]) -> Grid:
    """Lay lines of measures out as a grid: a header, then a row each."""
    there = [model for model in models if any(model in line for line in lines)]
    return [["", *there], *([line["measure"], *(line.get(model, "–") for model in there)] for line in lines)]


def _packages(folder: Path) -> list[tuple[str, str]]:
    attempts = (store.read_json(folder / "provenance.json") or {}).get("attempts") or [{}]
    last = attempts[-1]
    told = {"srlm": last.get("srlm"), "git": last.get("git"), "python": last.get("python"), **last.get("packages", {})}
    return [(name, str(value)) for name, value in told.items() if value]


def _eval_results(metrics: Mapping[str, float]) -> list[EvalResult]:
    """Name what fits a model index: accuracy as a judge, and the published benchmarks."""
    found: list[EvalResult] = []
    accuracy = metrics.get("evaluation/judge_pairwise_accuracy_tie_half")
    if accuracy is not None:
        found.append(
            EvalResult(
                task_type="text-ranking", task_name="Judging", dataset_name="held-out ranked responses",
                dataset_type="held-out", metric_type="accuracy", metric_value=round(accuracy, 4),
                metric_name="pairs in the order of their ranking, ties as halves",
            )
        )  # fmt: skip
    for key, (name, dataset, kind) in _BENCHMARKS.items():
        if (value := metrics.get(f"evaluation/{key}")) is not None:
            found.append(
                EvalResult(
                    task_type="text-generation", dataset_name=name, dataset_type=dataset, metric_type=kind,
                    metric_value=round(value, 4), metric_name=key,
                )
            )  # fmt: skip
    return found


# --- its datasets ---------------------------------------------------------------------------------------------------

_COLUMNS = {
    "prompt_id": "srlm, a hash", "response_id": "srlm, a hash", "judgment_id": "srlm, a hash",
    "pair_id": "srlm, a hash",
    "target_id": "srlm: what is judged", "other_id": "srlm: the other of two that are compared",
    "iteration": "srlm", "index": "srlm: which of several", "seed": "srlm", "source": "srlm: where the text is from",
    "generator": "srlm: who wrote it", "model": "srlm: who wrote it", "judge": "srlm: who judged",
    "messages": "whoever `generator` or `source` names", "response": "the model in `model`",
    "n_tokens": "the engine", "finish_reason": "the engine: stop, or length where it was cut",
    "text": "the model in `judge`", "verdict": "srlm, read in `text`; null where it could not be",
    "unreadable_reason": "srlm", "form": "srlm", "reading": "srlm", "rubric": "srlm: name and digest of the rubric",
    "first": "srlm: which of two was shown first", "kind": "srlm", "chosen": "the model that wrote `chosen_id`",
    "rejected": "the model that wrote `rejected_id`", "chosen_id": "srlm", "rejected_id": "srlm",
    "chosen_score": "srlm, from verdicts", "rejected_score": "srlm, from verdicts",
    "label": "srlm: probability that chosen is the better", "weight": "srlm",
    "id": "srlm: what was left out", "stage": "srlm", "reason": "srlm", "detail": "srlm",
}  # fmt: skip
"""Who made each column; a method's own are its own."""


def dataset_card(folder: Path, config: RunConfig, tables: Mapping[str, Mapping[int, Sequence[Path]]]) -> DatasetCard:
    """Write the card of a campaign's datasets. `tables`: by dataset and iteration, its parts."""
    drops = publishing.without_paths(folder, report.gather(folder, texts=False))["drops"]
    described = [_described(name, parts, drops) for name, parts in tables.items()]
    total = sum(one["total"] for one in described)
    text = pages.markdown().get_template("dataset_card_template.md.j2").render(
        name=folder.name, config=config, method=METHODS[config.method], tables=described,
        base=_shown(config.model.path), scripted=config.engine.kind == "scripted",
    )  # fmt: skip
    data = DatasetCardData(
        pretty_name=f"Datasets of the campaign {folder.name}",
        task_categories=["text-generation"],
        size_categories="n<1K" if total < 1000 else "1K<n<10K" if total < 10_000 else "10K<n<100K" if total < 100_000
        else "100K<n<1M" if total < 1_000_000 else "n>1M",
        tags=["self-rewarding", "srlm", "preference", "synthetic"],
        configs=[{"config_name": name, "data_files": f"{name}/*.parquet"} for name in tables],
    )  # fmt: skip
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _described(name: str, parts: Mapping[int, Sequence[Path]], drops: Mapping[str, Any]) -> dict[str, Any]:
    """Read of a dataset what its card tells: rows, columns, who wrote, what was left out, one row."""
    rows = {t: sum(pq.read_metadata(path).num_rows for path in paths) for t, paths in parts.items()}
    paths = [path for of in parts.values() for path in of]
    schema = pq.read_schema(paths[0])
    writers = [column for column in ("source", "generator", "model", "judge", "reason") if column in schema.names]
    counted: Counter[tuple[str, ...]] = Counter()
    for path in paths:
        columns = pq.read_table(path, columns=writers)
        counted.update(
            zip(*(map(str, columns[column].to_pylist()) for column in writers), strict=True) if writers else ()
        )
    first = store.read_part(paths[0]).slice(0, 1).to_pylist()[0]
    shown = {key: first[key] for key in ("messages", "response", "text", "chosen", "rejected") if first.get(key)}
    return {
        "name": name, "rows": rows, "total": sum(rows.values()),
        "columns": [
            (field.name, str(field.type), "yes" if field.nullable else "no", _COLUMNS.get(field.name, "the method"))
            for field in schema
        ],
        "writers": writers, "counted": sorted(counted.items()),
        "drops": [row for row in drops["rows"] if row["stage"] == name], "places": drops["places"],
        "sample": {key: _cut(value) for key, value in shown.items()},
    }  # fmt: skip


def _cut(value: Any) -> str:
    text = "\n\n".join(f"[{turn['role']}] {turn['content']}" for turn in value) if isinstance(value, list) else value
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"
