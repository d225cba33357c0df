"""comparison: campaigns against one another: how their settings and numbers differ, and what of it is more than error.

Reads the folders and nothing else; what was measured on other prompts or by another judge is said to be so.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import pages, report_figures, settings, side_by_side, store, summary, table
from srlm_core.measures import OF_THE_ANSWERS, OF_THE_JUDGE, OF_THE_MATCHES, suite_measures
from srlm_core.report_words import Measured, measured, policies
from srlm_core.spelling import spell
from srlm_core.summary import Summary

Campaigns = Mapping[str, Summary]
"""By name; the first is the one that the others are held against."""


def write_comparison(
    folders: Sequence[Path],
    target: Path,
    *,
    standings: Mapping[str, Any] | None = None,
    figure: report_figures.Figure | None = None,
) -> Path:
    """Write index.html, comparison.md and figures into a folder; return the path of the page.

    `standings`: a table that stands above it all, as `grid` and `notes`, and `caveats`; `figure` belongs to it.
    """
    folders = list(dict.fromkeys(folders))
    campaigns = {name: summary.collect(folder) for name, folder in zip(names(folders), folders, strict=True)}
    content = {
        "names": list(campaigns),
        "headline": headline(campaigns),
        "standings": standings,
        "caveats": standings["caveats"] if standings else caveats(folders, campaigns),
        "columns": table.COLUMNS,
        "cell": table.cell,
        "rows": [{"campaign": name, **row} for name, found in campaigns.items() for row in table.rows(found)],
        "differences": differences(campaigns),
        "settings": other_settings(campaigns),
        **stories(folders, campaigns),
    }
    above = {figure.name: figure} if figure else {}
    return pages.write(target, "comparison", content, above | figures(campaigns))


def names(folders: Sequence[Path]) -> list[str]:
    """Name campaigns as their folders are named; by their paths where two are named alike."""
    found = [folder.name for folder in folders]
    return found if len(set(found)) == len(found) else [str(folder) for folder in folders]


# --- in words -------------------------------------------------------------------------------------------------------


def headline(campaigns: Campaigns) -> list[str]:
    """Say of each campaign's last model how it judges and wins, against the first campaign's."""
    last = {name: policies(found)[-1] for name, found in campaigns.items() if policies(found)}
    if len(last) < 2:
        return ["Fewer than two of these campaigns have an evaluated model: there is nothing to compare yet."]
    first, *others = last
    said: list[str] = []
    for other in others:
        for measure, text in (
            ("judge_pairwise_accuracy_tie_half", "{} puts {} of the held-out pairs in their order, ties as halves"),
            ("win_rate_vs_sft_baseline", "{} has {} of the points against its own sft_baseline"),
        ):
            a, b = (measured(campaigns[name].of_model[last[name]], f"evaluation/{measure}") for name in (first, other))
            if a and b:
                gap = _gap(a, b)
                verdict = "more than two standard errors" if gap.beside(0) else "which the errors do not tell from none"
                said.append(
                    f"{text.format(f'{other} {last[other]}', b)}; {first} {last[first]}: {a}. "
                    f"The difference is {spell(gap.value, gap.stderr, form='+.2f')}, {verdict}."
                )
    return said or ["No measure is known of two of these campaigns' last models."]


def _gap(a: Measured, b: Measured) -> Measured:
    """How far b lies above a, with the error of both."""
    return Measured(b.value - a.value, math.hypot(a.stderr, b.stderr), min(a.n, b.n))


def caveats(folders: Sequence[Path], campaigns: Campaigns) -> list[str]:
    """Say what was not measured alike."""
    said = [
        f"{name} is not finished: {'; '.join(found.missing[:3])}" for name, found in campaigns.items() if found.missing
    ]
    for what, of in (
        ("evaluation prompts", _evaluation_prompts),
        ("held-out rankings", _heldout),
        ("judge of the head-to-heads", lambda folder: summary.head_to_heads(folder)[0]),
    ):
        known = [found for folder in folders if (found := of(folder))]
        if len(set(known)) > 1:
            said.append(f"not all have the same {what}: numbers that rest on them are of different things")
    if any(found.config and found.config.engine.kind == "scripted" for found in campaigns.values()):
        said.append("the scripted engine made at least one of them: that shows nothing about models")
    return [
        *said,
        "Errors are reckoned as if each had been asked prompts of its own: where these are the same, the error of a "
        "difference is usually smaller than stated.",
    ]


def _evaluation_prompts(folder: Path) -> frozenset[str]:
    return frozenset(side_by_side.prompts(folder))


def _heldout(folder: Path) -> frozenset[str]:
    """Return the ids of the responses that the last evaluated model judged."""
    for model in reversed(summary.models(folder)):
        try:
            parts = [store.read_part(path) for path in store.parts(folder / "evaluation" / model / "heldout")]
        except (OSError, pa.ArrowException):
            continue
        if parts:
            return frozenset(pa.concat_tables(parts)["target_id"].to_pylist())
    return frozenset()


# --- in numbers -----------------------------------------------------------------------------------------------------


def differences(campaigns: Campaigns) -> list[dict[str, Any]]:
    """Lay out, for each model that two campaigns have, each measure of both and how far they are apart."""
    first, *others = campaigns
    return [
        {"model": model, "first": first, "other": other, "lines": lines}
        for other in others
        for model in campaigns[first].models
        if model in campaigns[other].models
        if (lines := _differences(campaigns[first], campaigns[other], model))
    ]


def _differences(a: Summary, b: Summary, model: str) -> list[dict[str, str]]:
    names = {**OF_THE_JUDGE, **OF_THE_MATCHES, **OF_THE_ANSWERS, **suite_measures(a)}
    first, other = a.of_model[model], b.of_model[model]
    shown = {f"evaluation/{name}": label for name, label in names.items()}
    return [_difference(label, first, other, name) for name, label in shown.items() if name in first and name in other]


def _difference(label: str, a: Mapping[str, float], b: Mapping[str, float], name: str) -> dict[str, str]:
    first, other = measured(a, name), measured(b, name)
    gap = _gap(first, other) if first and other else None
    return {
        "measure": label,
        "first": spell(a[name], a.get(f"{name}_stderr")),
        "other": spell(b[name], b.get(f"{name}_stderr")),
        "gap": spell(b[name] - a[name], gap.stderr if gap else None, form="+.2f"),
        "apart": "beyond two errors" if gap and gap.beside(0) else "",
    }


def other_settings(campaigns: Campaigns) -> list[tuple[str, list[str]]]:
    """List the settings that are not the same in all: name, and each campaign's value."""
    flat = [settings.flat(found.config) if found.config else {} for found in campaigns.values()]
    names = dict.fromkeys(name for of in flat for name in of)
    spelled = {name: [store.canonical(of[name]).decode() if name in of else "–" for of in flat] for name in names}
    return [(name, values) for name, values in spelled.items() if len(set(values)) > 1]


# --- to look at -----------------------------------------------------------------------------------------------------


def figures(campaigns: Campaigns) -> dict[str, report_figures.Figure]:
    """Draw each measure by model, a colour for each campaign."""
    drawn = [
        report_figures.by_campaign(name, title, unit, f"evaluation/{measure}", campaigns, level=level)
        for name, title, unit, measure, level in (
            ("judge_accuracy", "Judge accuracy", "held-out pairs, ties as halves",
             "judge_pairwise_accuracy_tie_half", 0.5),
            ("wins", "Head to head against its own sft_baseline", "share of points", "win_rate_vs_sft_baseline", 0.5),
            ("length", "Length of answers", "tokens", "response_length_tokens_mean", None),
        )
    ]  # fmt: skip
    return {figure.name: figure for figure in drawn if figure is not None}


def stories(folders: Sequence[Path], campaigns: Campaigns) -> dict[str, Any]:
    """Put what the campaigns' last models answered to the same prompts side by side."""
    said: dict[str, Mapping[str, Any]] = {}
    for folder, (name, found) in zip(folders, campaigns.items(), strict=True):
        if policies(found):
            said[f"{name}/{policies(found)[-1]}"] = side_by_side.answers(folder, policies(found)[-1])
    asked = side_by_side.prompts(folders[0])
    shared = [prompt for prompt in asked if all(prompt in answers for answers in said.values())]
    told = [
        {"prompt": asked[prompt], "answers": [side_by_side.shown(answers[prompt]) for answers in said.values()]}
        for prompt in shared[: side_by_side.SHOWN]
    ]
    return {"models": list(said), "prompts": told, "total": len(shared)}
