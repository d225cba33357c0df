"""One model, measured as judge and as policy: any checkpoint, outside a campaign's loop."""

import json
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows import form, slots, worker
from srlm_core import recipes


@flow(name="evaluate-model", flow_run_name="{model}")
def measure(
    model: Annotated[str, Field(min_length=1)],
    recipe: form.Recipe = "self_rewarding",
    size: form.Size = "",
    name: form.Name = "",
    settings: form.Changed = form.NOTHING,
    overrides: list[form.Override] = [],  # noqa: B006 - the form needs the empty list, nothing changes it
    redo: bool = False,
) -> dict[str, Any]:
    """Measure a model with a recipe's evaluation settings; nothing is asked twice.

    Args:
        model: A checkpoint folder (below the campaigns' folder, where it is relative) or a hub id.
        recipe: Whose evaluation settings hold.
        size: smoke, small, node, paper. Empty: the recipe's own.
        name: Of the folder that keeps it. Empty: from the model.
        settings: What differs from the recipe. An empty field is the recipe's own value.
        overrides: Settings that have no field here.
        redo: Ask again what other settings change.
    """
    from flows.running import evaluate_model, evaluation_name

    worker.end_with_worker()
    model = form.path_below(model)
    sets = [f"model.path={json.dumps(model)}", *form.spelled(settings, overrides)]
    config = recipes.load(form.recipe_file(recipe), size or None, sets)
    name = name or evaluation_name(model, None)
    with slots.held(config):
        results = evaluate_model(config, name, form.root(), model, judging_only=False, redo=redo)
    page = f"# {model}\n\n```json\n{json.dumps(results, indent=2)}\n```\n\nKept in `{form.root() / name}`.\n"
    create_markdown_artifact(page, "evaluation", f"What {model} is like")
    return results
