"""report: a campaign as a page that explains itself, report/index.html, and the same as report/report.md.

Reads the folder and nothing else, so it can be written for a campaign that is half done, and again at any time: the
same files give the same bytes. What models wrote is untrusted text: escaped, fenced, and on a page without scripts.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import (
    approval,
    counting,
    evaluation,
    gates,
    pages,
    paper,
    report_words,
    settings,
    side_by_side,
    store,
    summary,
    table,
    weights,
)
from srlm_core.config import RunConfig
from srlm_core.measures import OF_THE_ANSWERS, OF_THE_ITERATION, OF_THE_JUDGE, suite_measures
from srlm_core.rates import Rate, rate
from srlm_core.report_figures import all_figures
from srlm_core.show import Story, length, sample, show, trained
from srlm_core.spelling import spell
from srlm_core.summary import Summary

__all__ = ["show", "write_report"]

SAMPLES = 5
"""Prompts shown per iteration."""
_SET_ASIDE_SHOWN = 20
_FORMS_SHOWN = 8
_TEXT_SHOWN = 20_000
"""Characters of one text that are shown; the files have all of it."""


def write_report(campaign_folder: Path) -> Path:
    """Write report/index.html with its figures, report.md, and side_by_side.html; return the path of the page."""
    content = gather(campaign_folder)
    target = campaign_folder / "report"
    told = side_by_side.stories(campaign_folder)
    if told["prompts"]:
        page = pages.html().get_template("side_by_side_template.html.j2").render(name=campaign_folder.name, **told)
        store.write_text(target / "side_by_side.html", page)
    return pages.write(target, "report", content, all_figures(**content["to_draw"]))


def gather(folder: Path, *, texts: bool = True) -> dict[str, Any]:
    """Collect everything that both templates show, and under `to_draw` what the figures are drawn from.

    Without `texts`, nothing of it is from a prompt, a response or a file.
    """
    found = summary.collect(folder)
    judge, matches = summary.head_to_heads(folder)
    answers = {model: _answers(folder, model) for model in found.models}
    by_length = {pair: _wins_by_length(folder, *pair, answers) for pair in matches}
    timings = store.read_json(folder / "timings.json") or {}
    usage = store.read_json(folder / "usage.json") or {}
    curves = {model: summary.training_curve(folder, model) for model in found.models}
    tokens = {model: [n_tokens for _, n_tokens in of.values()] for model, of in answers.items()}
    return {
        "name": folder.name,
        "config": found.config,
        "missing": found.missing,
        "headline": report_words.headline(found, matches, by_length, judge),
        "warnings": report_words.warnings(found, matches),
        "cannot_say": report_words.cannot_say(found, matches, judge),
        "columns": table.COLUMNS,
        "rows": table.rows(found),
        "cell": table.cell,
        "spell": spell,
        "to_draw": {"found": found, "curves": curves, "tokens": tokens, "matches": matches, "timings": timings},
        "gates": _gates(folder),
        "decided": _decided(folder, found),
        "made": _by_iteration(found),
        "judges": _by_model(found, OF_THE_JUDGE),
        "suites": _by_model(found, suite_measures(found)),
        "annotators": _annotators(folder, found),
        "answered": _by_model(found, OF_THE_ANSWERS),
        "matches": _match_rows(matches, by_length),
        "judge": judge,
        "plays_itself": summary.plays_itself(folder),
        "other_judges": _other_judges(folder),
        "people": _people(folder),
        "trainings": _trainings(folder, found),
        "usage": _usage(usage, timings),
        "drops": _drops(folder, found),
        "attacks": _attacks(folder, found),
        "texts": texts,
        "side_by_side": texts and (folder / "evaluation" / "prompts.parquet").exists(),
        "taught": report_words.taught(store.read_json(folder / "bootstrap" / "eft.json")),
        "set_aside": _set_aside(folder, shown=_SET_ASIDE_SHOWN if texts else 0),
        "samples": _samples(folder, found, shown=SAMPLES if texts else 0),
        "changed": _changed(found.config),
        "provenance": _flat(store.read_json(folder / "provenance.json") or {}),
    }


# --- what is shown --------------------------------------------------------------------------------------------------


def _answers(folder: Path, model: str) -> dict[str, tuple[int, int]]:
    """A model's answers to the evaluation prompts: id to (characters, tokens)."""
    try:
        rows = store.read_part(folder / "evaluation" / model / "responses" / "part-00000.parquet")
    except (OSError, pa.ArrowException):
        return {}
    return {
        row["response_id"]: (len(row["response"]), row["n_tokens"])
        for row in rows.select(["response_id", "response", "n_tokens"]).to_pylist()
    }


def _wins_by_length(
    folder: Path, newer: str, older: str, answers: Mapping[str, Mapping[str, tuple[int, int]]]
) -> dict[str, dict[str, Any]]:
    """Split a head to head by whether the newer model's answer is the longer one, in characters."""
    try:
        rows = store.read_part(folder / "evaluation" / "head_to_head" / f"{newer}_vs_{older}" / "part-00000.parquet")
    except (OSError, pa.ArrowException):
        rows = pa.table({"target_id": [], "other_id": [], "first": [], "verdict": []})
    lengths = {answer: n_chars for model in (newer, older) for answer, (n_chars, _) in answers[model].items()}
    is_longer = [
        lengths.get(a, 0) > lengths.get(b, 0)
        for a, b in zip(rows["target_id"].to_pylist(), rows["other_id"].to_pylist(), strict=True)
    ]
    longer = rows.filter(pa.array(is_longer, pa.bool_()))
    rest = rows.filter(pa.array([not value for value in is_longer], pa.bool_()))
    return {
        "longer": evaluation.tally(longer)["win_or_half_tie"],
        "not_longer": evaluation.tally(rest)["win_or_half_tie"],
    }


def _annotators(folder: Path, found: Summary) -> list[str]:
    """Say who judged the published benchmarks, and where a model judged its own answers."""
    told: dict[str, None] = {}
    for model in found.models:
        for name, figures in ((summary.evaluation_results(folder, model) or {}).get("suites") or {}).items():
            if "judge" in figures:
                told[f"{name} by {figures['judge']}"] = None
            if figures.get("judged_by_itself"):
                told[f"{name}: {model} judged its own answers"] = None
    return list(told)


def _by_model(found: Summary, names: Mapping[str, str]) -> list[dict[str, str]]:
    """Spell some measures of every evaluated model, a line each."""
    return [
        {
            "measure": label,
            **{model: _spelled(of, f"evaluation/{name}") for model, of in found.of_model.items() if of},
            **({"paper": _published(name)} if any(name in paper.FIGURES for name in names) else {}),
        }
        for name, label in names.items()
        if any(f"evaluation/{name}" in of for of in found.of_model.values())
    ]


def _gates(folder: Path) -> list[dict[str, str]]:
    """Spell what every model came to at its gates, a line each."""
    return [
        {
            "model": f"M{t}",
            "gate": gate.name,
            "value": spell(gate.value, gate.stderr, gate.n),
            "limit": gate.bound or "–",
            "came": {True: "passed", False: "failed", None: "not measured"}[gate.passed],
            "note": gate.note,
        }
        for t, asked in gates.read(folder).items()
        for gate in asked
    ]


def _decided(folder: Path, found: Summary) -> list[str]:
    """Say what a person decided between iterations."""
    decisions = {t: approval.read(folder, t) for t in found.iterations}
    words = {True: "go on", False: "end the campaign there"}
    return [
        f"After iteration {t} somebody decided: {words[go_on]}." for t, go_on in decisions.items() if go_on is not None
    ]


def _by_iteration(found: Summary) -> dict[str, Any]:
    """Spell what each iteration made, a line for each measure, and what changed from the first to the last."""
    made = list(found.of_iteration.values())
    lines = [
        {
            "measure": label,
            "cells": [spell(of.get(name), of.get(f"{name}_stderr"), form=_form(name)) for of in made],
            "change": _change(made[0], made[-1], name) if len(made) > 1 else "",
        }
        for name, label in {**OF_THE_ITERATION, **found.labels}.items()
        if any(name in of for of in made)
    ]
    return {"iterations": list(found.of_iteration), "lines": lines}


def _form(name: str) -> str:
    """Numbers of things are whole, shares and scores have two digits."""
    return ".0f" if "tokens" in name or name in ("pairs/n", "prompts/kept") else ".2f"


def _change(first: Mapping[str, float], last: Mapping[str, float], name: str) -> str:
    if name not in first or name not in last:
        return "–"
    a, b = (of.get(f"{name}_stderr") for of in (first, last))
    error = None if a is None or b is None else math.hypot(a, b)
    return spell(last[name] - first[name], error, form=f"+{_form(name)}")


def _published(name: str) -> str:
    """Spell what the paper's four models reached, from the SFT baseline to M3."""
    form = ".0f" if name.endswith("_chars") else ".2f"
    return " · ".join(spell(value, form=form) for value in paper.FIGURES.get(name, ()))


def _spelled(metrics: Mapping[str, float], name: str) -> str:
    n = metrics.get(f"{name}_n")
    return spell(metrics.get(name), metrics.get(f"{name}_stderr"), None if n is None else int(n))


def _people(folder: Path) -> list[dict[str, str]]:
    """Spell what people voted on each match."""
    return [
        {
            "match": pair.replace("_vs_", " against "),
            "voters": str(told["voters"]),
            "points": spell(*Rate(**told["win_or_half_tie"])),
            "split": "\xa0/\xa0".join(spell(told[key]["value"]) for key in ("win", "tie", "lose")),
            "people": spell(*Rate(**told["two_people_agree"])),
            "judge": spell(*Rate(**told["judge_agrees"]["same"])) if "judge_agrees" in told else "–",
        }
        for pair, told in summary.votes(folder).items()
    ]


def _other_judges(folder: Path) -> list[dict[str, str]]:
    """Spell each further judge's result of each match, and how far it agrees with the first judge."""
    rows: list[dict[str, str]] = []
    for told in summary.other_judges(folder):
        for pair, tally in told["comparisons"].items():
            points, same = (Rate(**rate) for rate in (tally["win_or_half_tie"], tally["agreement"]["same"]))
            rows.append(
                {
                    "match": pair.replace("_vs_", " against "),
                    "judge": told["judge"],
                    "points": spell(*points),
                    "same": spell(*same[:2]),
                    "kappa": spell(tally["agreement"]["kappa"]),
                }
            )
    return rows


def _match_rows(
    matches: Mapping[tuple[str, str], Mapping[str, Any]], by_length: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[dict[str, str]]:
    def say(rate: Mapping[str, Any], *, with_n: bool = False) -> str:
        return spell(rate["value"], rate["stderr"], rate["n"] if with_n else None)

    return [
        {
            "match": f"{newer} against {older}",
            "points": say(tally["win_or_half_tie"], with_n=True),
            "controlled": say(tally.get("length_controlled") or rate([])._asdict()),
            "split": "\xa0/\xa0".join(spell(tally[key]["value"]) for key in ("win", "tie", "lose")),
            "paper": "\xa0/\xa0".join(spell(share) for share in paper.MATCHES.get((newer, older), ())),
            "flips": say(tally["flip_rate"]),
            "longer": say(by_length[newer, older]["longer"], with_n=True),
            "not_longer": say(by_length[newer, older]["not_longer"], with_n=True),
        }
        for (newer, older), tally in matches.items()
    ]


def _trainings(folder: Path, found: Summary) -> list[dict[str, str]]:
    shown: list[dict[str, str]] = []
    for model in found.models:
        of = summary.training_metrics(folder, model)
        marker = weights.marker(folder, model) or {}
        if of:
            first, last = spell(of.get("training/loss_first")), spell(of.get("training/loss"))
            shown.append(
                {
                    "model": model,
                    "kind": str(marker.get("kind", "not finished")),
                    "from": str((marker.get("init_from") or ["–"])[0]),
                    "reference": str((marker.get("reference") or ["–"])[0]),
                    "rows": spell(of.get("training/n_rows"), form=".0f"),
                    "dropped": spell(of.get("training/dropped"), form=".0f"),
                    "steps": spell(of.get("training/steps"), form=".0f"),
                    "loss": f"{first} → {last}",
                    "accuracy": spell(of.get("training/rewards_accuracy")),
                    "margin": spell(of.get("training/rewards_margin")),
                    "seconds": spell(of.get("training/seconds"), form=".0f"),
                }
            )
    return shown


class Use(NamedTuple):
    """What one stage asked of the engines, spelled."""

    stage: str
    requests: str
    tokens: str
    tokens_per_request: str
    seconds: str
    tokens_per_s: str


def _usage(usage: Mapping[str, Mapping[str, float]], timings: Mapping[str, float]) -> dict[str, Any]:
    """Requests and tokens per stage, and tokens over the clock of the phases that sample."""
    clock = sum(seconds for name, seconds in timings.items() if name.startswith(("iteration ", "evaluating ")))
    total = sum(use["tokens"] for use in usage.values())
    rows = [
        Use(
            stage,
            f"{use['requests']:,.0f}",
            f"{use['tokens']:,.0f}",
            f"{use['tokens'] / use['requests']:,.0f}" if use["requests"] else "–",
            f"{use['seconds']:,.1f}",
            f"{use['tokens'] / use['seconds']:,.0f}" if use["seconds"] else "–",
        )
        for stage, use in usage.items()
    ]
    return {"rows": rows, "total": f"{total:,.0f}", "per_s": f"{total / clock:,.0f}" if clock and total else None}


def _drops(folder: Path, found: Summary) -> dict[str, Any]:
    """Count what was left out: a row per stage and reason, a column per place."""
    places: dict[str, Counter[tuple[str, str]]] = {
        "bootstrap": counting.count_drops(folder / "bootstrap" / "drops", [])
    }
    for t, counts in found.iterations.items():
        unreadable = {("judgments", f"unreadable: {reason}"): n for reason, n in counts.unreadable.items()}
        places[f"iteration {t}"] = counts.drops + Counter(unreadable)
    measuring: Counter[tuple[str, str]] = Counter()
    for drops in sorted((folder / "evaluation").glob("*/drops")):
        measuring += counting.count_drops(drops, [])
    places["evaluation"] = measuring
    shown = {name: counted for name, counted in places.items() if counted or name.startswith("iteration")}
    keys = sorted({key for counted in shown.values() for key in counted}, key=lambda key: (_ORDER.get(key[0], 9), key))
    rows = [
        {"stage": stage, "reason": reason, "counts": [counted[stage, reason] for counted in shown.values()]}
        for stage, reason in keys
    ]
    return {"places": list(shown), "rows": rows}


_ORDER = {stage: place for place, stage in enumerate(("prompts", "responses", "judgments", "pairs", "training"))}


def _attacks(folder: Path, found: Summary) -> dict[str, Any]:
    """The mean shift per model, and the forms that won most from the last model measured."""
    by_model: dict[str, dict[str, float]] = {}
    for model in found.models:
        attacked = (summary.evaluation_results(folder, model) or {}).get("attacks")
        if attacked:
            by_model[model] = attacked["by_form"]
    shifts = [_shift(found.of_model[model]) for model in by_model]
    if not by_model:
        return {"shifts": [], "forms": [], "models": [], "last": None}
    last = list(by_model)[-1]
    worst = sorted(by_model[last].items(), key=lambda item: (-item[1], item[0]))[:_FORMS_SHOWN]
    forms = [
        {"form": form, "shifts": [spell(of.get(form), form="+.2f") for of in by_model.values()]} for form, _ in worst
    ]
    return {"shifts": shifts, "forms": forms, "models": list(by_model), "last": last}


def _shift(metrics: Mapping[str, float]) -> str:
    name = "evaluation/attack_shift"
    return spell(metrics.get(name), metrics.get(f"{name}_stderr"), int(metrics.get(f"{name}_n", 0)), "+.2f")


def _set_aside(folder: Path, shown: int) -> list[dict[str, Any]]:
    """Rows of the user's files that were not used."""
    files = sorted((folder / "bootstrap" / "set_aside").glob("*.json"))
    read = {path.stem: store.read_json(path) or [] for path in files}
    return [
        {
            "file": name, "count": len(rows), "rows": rows[:shown],
            "reasons": Counter(row["reason"].split(":")[0] for row in rows).most_common(),
        }
        for name, rows in read.items()
        if rows
    ]  # fmt: skip


def _samples(folder: Path, found: Summary, shown: int) -> list[dict[str, Any]]:
    seed = found.config.seed if found.config else 0
    drawn = {t: sample(folder, t, shown, seed) for t in found.iterations}
    return [
        {"iteration": t, "of": counts.prompts, "stories": [_told(folder, story) for story in drawn[t]]}
        for t, counts in found.iterations.items()
    ]


def _told(folder: Path, story: Story) -> dict[str, Any]:
    """A story laid out for a template."""
    prompt = story.prompt
    return {
        "id": prompt["prompt_id"],
        "source": prompt["source"] + (f", written by {prompt['generator']}" if prompt["generator"] else ""),
        "title": _shortened(prompt["messages"][-1]["content"], 110),
        "messages": [{"role": m["role"], "text": _cut(m["content"])} for m in prompt["messages"]],
        "fate": story.fate(),
        "trained": [model for pair in story.pairs for model in trained(folder, pair["pair_id"])],
        "responses": [_told_response(story, row) for row in story.responses],
        "brought": [{"role": role, "text": _cut(text)} for role, text in story.brought()],
    }


def _told_response(story: Story, row: Mapping[str, Any]) -> dict[str, Any]:
    score = story.scores.get(row["response_id"])
    return {
        "number": row["index"] + 1,
        "text": _cut(row["response"]),
        "length": length(row),
        "cut": row["finish_reason"] == "length",
        "role": story.role(row["response_id"]),
        "score": spell(score.mean) if score else None,
        "left_out": story.why_not(row["response_id"]),
        "weighed": story.weighed[row["response_id"]],
        "judgments": [
            {
                "number": judged["index"] + 1,
                "judge": judged["judge"],
                "said": story.said(judged),
                "text": _cut(judged["text"]),
            }
            for judged in story.judged.get(row["response_id"], [])
        ],
    }


def _shortened(text: str, limit: int) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _cut(text: str) -> str:
    rest = len(text) - _TEXT_SHOWN
    return text if rest <= 0 else f"{text[:_TEXT_SHOWN]}\n… ({rest:,} more characters in the file)"


def _changed(config: RunConfig | None) -> list[tuple[str, str, str]]:
    """Settings that differ from the defaults, which are the paper's: name, default, here."""
    if config is None:
        return []
    usual, here = settings.flat(RunConfig.model_validate({})), settings.flat(config)
    changed = [name for name in here if name not in usual or usual[name] != here[name]]
    return [(name, _written(usual[name]) if name in usual else "–", _written(here[name])) for name in changed]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else store.canonical(value).decode()


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    result: list[tuple[str, str]] = []
    for key, inner in value.items():
        result += (
            _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else [(f"{prefix}{key}", _written(inner))]
        )
    return result
