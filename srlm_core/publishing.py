"""publishing: a campaign's numbers without its texts, for others to see where the data may not go along."""

from pathlib import Path
from typing import Any

from srlm_core import pages, report, store, summary
from srlm_core.report_figures import all_figures

_AS_THEY_ARE = ("provenance.json", "timings.json", "usage.json")


def publish(folder: Path, target: Path) -> Path:
    """Write report, figures and numbers of a campaign into a folder; return the path of the page.

    No text of a prompt, a response or a file is in it, and of files on this machine their names alone.
    """
    content = report.gather(folder, texts=False)
    config = content["config"]
    for name in _AS_THEY_ARE:
        store.write_json(target / name, store.read_json(folder / name) or {})
    store.write_json(target / "config.json", config.model_dump(mode="json") if config else {})
    store.write_json(target / "models.json", summary.table(folder))
    store.write_json(target / "evaluation.json", measured(folder))
    return pages.write(target, "report", content, all_figures(**content["to_draw"]))


def measured(folder: Path) -> dict[str, Any]:
    """Gather every model's results.json, and that of the head-to-heads."""
    found = {model: summary.evaluation_results(folder, model) for model in summary.models(folder)}
    found["head_to_head"] = store.read_json(folder / "evaluation" / "head_to_head" / "results.json")
    return {name: results for name, results in found.items() if results is not None}
