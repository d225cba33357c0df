"""side_by_side: what every model answered to each evaluation prompt, and who won, on one page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import evaluation, schemas, store, summary
from srlm_core.answers import refuses

SHOWN = 200
"""Prompts on the page, from the first."""
_RESULTS = {1.0: "wins", 0.5: "ties", 0.0: "loses"}


def stories(folder: Path) -> dict[str, Any]:
    """Gather the models that answered, and for each prompt their answers and the results of their matches."""
    asked = prompts(folder)
    answered = {model: found for model in summary.models(folder) if (found := answers(folder, model))}
    outcomes = _outcomes(folder)
    told = [
        {
            "prompt": prompt,
            "answers": [shown(of.get(prompt_id)) for of in answered.values()],
            "matches": [
                f"{newer} {_RESULTS[results[pair]]} against {older}"
                for (newer, older), results in outcomes.items()
                if (pair := _ids(answered, newer, older, prompt_id)) in results
            ],
        }
        for prompt_id, prompt in asked.items()
    ]
    return {"models": list(answered), "prompts": told[:SHOWN], "total": len(told)}


def prompts(folder: Path) -> dict[str, str]:
    """Read the campaign's evaluation prompts: id to text; empty where nothing has been measured."""
    try:
        rows = store.read_part(folder / "evaluation" / "prompts.parquet").to_pylist()
    except (OSError, pa.ArrowException):
        return {}
    return {row["prompt_id"]: schemas.prompt_text(row["messages"]) for row in rows}


def answers(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """Read a model's answers to them: prompt's id to its row of RESPONSES; empty where there are none."""
    try:
        parts = [store.read_part(path) for path in store.parts(folder / "evaluation" / model / "responses")]
    except (OSError, pa.ArrowException):
        return {}
    return {row["prompt_id"]: row for part in parts for row in part.to_pylist()}


def shown(row: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Lay an answer out for a page: its text and facts; None where there is none."""
    if row is None:
        return None
    facts = [f"{row['n_tokens']} tokens", f"{len(row['response'])} characters"]
    facts += ["cut at max_tokens"] if row["finish_reason"] == "length" else []
    facts += ["begins like a refusal"] if refuses(row["response"]) else []
    return {"text": row["response"], "facts": ", ".join(facts)}


def _outcomes(folder: Path) -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """Read each head-to-head's results by the two answers' ids."""
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for newer, older in summary.head_to_heads(folder)[1]:
        try:
            rows = store.read_part(
                folder / "evaluation" / "head_to_head" / f"{newer}_vs_{older}" / "part-00000.parquet"
            )
        except (OSError, pa.ArrowException):
            continue
        found[newer, older] = evaluation.results(rows)
    return found


def _ids(
    answered: Mapping[str, Mapping[str, Mapping[str, Any]]], newer: str, older: str, prompt_id: str
) -> tuple[str, str]:
    a, b = (answered.get(model, {}).get(prompt_id, {}).get("response_id", "") for model in (newer, older))
    return a, b
