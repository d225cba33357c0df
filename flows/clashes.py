"""What a form cannot check field by field: settings that a recipe cannot work with, as conditions of its schema.

Prefect's server knows a form's schema alone. So the recipes are asked beforehand what they work with, and their answers
go into the schema of every deployment that has this form: `python -m flows.clashes`, after `prefect deploy`. A form
with `overrides` is left to the run: what is set there may mend what clashes here.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, get_args

from flows import form
from srlm_core import methods, recipes, settings
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError

MENDED_BY = {
    "responses_sampling_max_tokens": "engine_context", "engine_context": "responses_sampling_max_tokens",
    "prompts_file_share": "prompts_file",
}  # fmt: skip
"""Fields that clash by the value of another one; where both are filled in, the run itself looks."""
MOST = 1_000_000
"""Tried where a setting has no upper bound."""
FINE = 1e-6
"""How near to where fractions stop working their bound is found, as a share of the way there."""

Fragment = Mapping[str, Any]
"""JSON schema of the values that a recipe works with."""


class Clash(NamedTuple):
    """A field, and what a recipe works with there."""

    field: str
    allowed: str
    """Fragment, as JSON."""


def found() -> dict[Clash, dict[str, list[str]]]:
    """Ask every recipe at every size what it cannot work with: clash to recipes to the sizes where it holds."""
    clashes: dict[Clash, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    answers: dict[str, list[Clash]] = {}
    for recipe in form.offered_recipes():
        configs = {size: config for size in get_args(form.Size) if (config := _loaded(recipe, size))}
        if configs and len(configs) < len(get_args(form.Size)):
            clashes[Clash("size", json.dumps({"enum": list(configs)}))][recipe] = []
        for size, config in configs.items():
            if not _fits(config):
                continue  # one of the team's own, which a form's settings may mend; else the run says what is wrong
            alike = config.model_dump_json(exclude={"recipe", "size"})  # `small` is often like `demo`
            if alike not in answers:
                answers[alike] = list(_of(config))
            for clash in answers[alike]:
                clashes[clash][recipe].append(size)
    return clashes


def _loaded(recipe: str, size: str) -> RunConfig | None:
    """Load a recipe at a size that it has; None also for a file that cannot be read, of which the run says why."""
    with suppress(ConfigError):
        return recipes.load(form.recipe_file(recipe), size or None)
    return None


def _fits(config: RunConfig) -> bool:
    try:
        methods.require_fit(config)
    except ConfigError:
        return False
    return True


def _of(config: RunConfig) -> Iterable[Clash]:
    fields, own, all_of_it = form.Changed.model_json_schema()["properties"], settings.flat(config), config.model_dump()

    def works(name: str, value: Any) -> bool:
        changed = recipes.parse_override(f"{name}={json.dumps(value)}")
        try:
            return _fits(recipes.validate(recipes.merge(all_of_it, changed)))
        except ConfigError:
            return False

    for name in form.OFFERED:
        field = name.replace(".", "_")
        allowed = allows(fields[field], partial(works, name), own[name])
        if allowed is not None:
            yield Clash(field, json.dumps(allowed))


# --- what a field may hold --------------------------------------------------------------------------------------------


def allows(field: Fragment, works: Callable[[Any], bool], own: Any) -> Fragment | None:
    """Find the values of a field that work; None where all within its own bounds do, null's type where none does.

    Of numbers those that work lie side by side, and `own`, the recipe's value, is among them.
    """
    if "enum" in field:
        working = [value for value in field["enum"] if works(value)]
        return None if working == field["enum"] else {"enum": working} if working else {"type": "null"}
    if field["type"] not in ("integer", "number"):
        return None
    least, most = _bounds(field)
    inside = next((value for value in (own, least, most) if value is not None and works(value)), None)
    if inside is None:
        return {"type": "null"}
    low, high = (_edge(end, inside, works, whole=field["type"] == "integer") for end in (least, most))
    narrowed = {"minimum": low} if low > least else {}
    narrowed |= {"maximum": high} if high < most else {}
    return ({"const": low} if low == high else narrowed) or None


def _bounds(field: Fragment) -> tuple[float, float]:
    if field["type"] == "integer":
        return field.get("minimum", field.get("exclusiveMinimum", -1) + 1), field.get("maximum", MOST)
    above, below = field.get("exclusiveMinimum", 0.0), field.get("exclusiveMaximum", float(MOST))
    return field.get("minimum", math.nextafter(above, MOST)), field.get("maximum", math.nextafter(below, -MOST))


def _edge(end: float, inside: float, works: Callable[[Any], bool], *, whole: bool) -> float:
    """Halve the way from a value that works to a bound that may not, down to the last that works."""
    if works(end):
        return end
    if not whole and not works(inside + (end - inside) * FINE):
        return inside
    good, bad = inside, end
    while abs(bad - good) > (1 if whole else abs(end - inside) * FINE):
        between = (good + bad) // 2 if whole else (good + bad) / 2
        good, bad = (between, bad) if works(between) else (good, between)
    return good


# --- as a schema says it ----------------------------------------------------------------------------------------------


def conditions(clashes: Mapping[Clash, Mapping[str, list[str]]], defaults: Mapping[str, str]) -> list[dict[str, Any]]:
    """Say clashes as conditions of a form's schema. `defaults`: what an absent `recipe` and `size` mean."""
    said = []
    for (field, allowed), where in clashes.items():
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for recipe, sizes in where.items():
            alike[tuple(sizes)].append(recipe)
        for sizes, of_recipes in alike.items():
            asked = [_is("recipe", of_recipes, defaults)]
            if field == "size":
                said.append({"if": asked[0], "then": {"properties": {"size": json.loads(allowed)}}})
                continue
            other = {MENDED_BY[field]: False} if field in MENDED_BY else {}
            alone = {"settings": {"properties": other}, "overrides": {"maxItems": 0}}
            asked += [_is("size", list(sizes), defaults), {"properties": alone}]
            narrowed = {"settings": {"properties": {field: json.loads(allowed)}}}
            said.append({"if": {"allOf": asked}, "then": {"properties": narrowed}})
    return said


def _is(name: str, values: list[str], defaults: Mapping[str, str]) -> dict[str, Any]:
    """Hold where a parameter is one of `values`. Not by `required`, which Prefect takes out where it likes."""
    if defaults[name] in values:
        return {"properties": {name: {"enum": values}}}
    return {"not": {"properties": {name: {"not": {"enum": values}}}}}


def with_conditions(schema: Mapping[str, Any], clashes: Mapping[Clash, Mapping[str, list[str]]]) -> dict[str, Any]:
    """Return a form's schema with the conditions in it."""
    defaults = {name: schema["properties"][name].get("default", "") for name in ("recipe", "size")}
    return {**schema, "allOf": conditions(clashes, defaults)}


def main() -> None:
    """Narrow the forms of all deployments that choose a recipe."""
    from prefect import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    clashes = found()
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            schema = deployment.parameter_openapi_schema or {}
            if {"recipe", "size", "settings"} <= schema.get("properties", {}).keys():
                update = DeploymentUpdate(parameter_openapi_schema=with_conditions(schema, clashes))
                client.update_deployment(deployment.id, update)


if __name__ == "__main__":
    main()
