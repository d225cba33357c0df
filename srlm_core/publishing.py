"""publishing: a campaign's numbers without its texts, for others to see where the data may not go along."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from srlm_core import pages, report, store, summary, table
from srlm_core.report_figures import all_figures


def publish(folder: Path, target: Path) -> Path:
    """Write report, figures and numbers of a campaign into a folder; return the path of the page.

    No text of a prompt, a response or a file is in it, and of the files that its settings name only their last part.
    """
    settings, hide = store.read_json(folder / "config.json") or {}, partial(without_paths, folder)
    kept = {name: store.read_json(folder / f"{name}.json") or {} for name in ("provenance", "timings", "usage")}
    kept |= {"config": settings, "models": table.of_campaign(folder), "evaluation": measured(folder)}
    for name, content in kept.items():
        store.write_json(target / f"{name}.json", hide(content))
    content = hide(report.gather(folder, texts=False))
    return pages.write(target, "report", content, all_figures(**content["to_draw"]))


def without_paths(folder: Path, value: Any) -> Any:
    """Put names in the place of the files and folders that a campaign's settings name, wherever in a value."""
    settings = store.read_json(folder / "config.json") or {}
    return _hidden({path: Path(path).name for path in sorted(_paths(settings), key=len, reverse=True)}, value)


def measured(folder: Path) -> dict[str, Any]:
    """Gather every model's results.json, and that of the head-to-heads."""
    found = {model: summary.evaluation_results(folder, model) for model in summary.models(folder)}
    found["head_to_head"] = store.read_json(folder / "evaluation" / "head_to_head" / "results.json")
    return {name: results for name, results in found.items() if results is not None}


def _paths(value: Any) -> Iterator[str]:
    """Find what names a file or a folder of this machine; names of the hub and endpoints do not."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, str) and "/" in value and (Path(value).is_absolute() or Path(value).exists()):
        yield value


def _hidden(names: Mapping[str, str], value: Any) -> Any:
    """Put names in the place of paths, however deep in a structure and wherever in a text."""
    hide = partial(_hidden, names)
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, dict):
        return {hide(key): hide(inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(hide, value))
    if isinstance(value, list | tuple):
        return type(value)(map(hide, value))
    return value
