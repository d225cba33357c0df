"""Recipes: sparse TOML files, one per method, with its sizes; `load` resolves one into a RunConfig."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError

FOLDER = Path(__file__).parent
SHORTCUTS = {"smoke": ("self_rewarding", "smoke"), "demo": ("self_rewarding", "demo")}
"""Names that mean a recipe at a size."""


class Recipe(NamedTuple):
    """A recipe file: what holds for all sizes, and what each size changes."""

    name: str
    common: dict[str, Any]
    sizes: dict[str, dict[str, Any]]


def names() -> list[str]:
    """List the recipes that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str, above: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name, or by the path of a TOML file, laid over the one that it extends.

    Raises ConfigError, naming the near ones. `above`: the recipes that extend it.
    """
    if name in above:
        raise ConfigError(f"expected a recipe that extends another, got a circle: {' > '.join([*above, name])}.")
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = [*names(), *SHORTCUTS]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known)}."
        raise ConfigError(f"expected a recipe, got {name!r}. {hint}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected TOML in {path}, got: {error}.") from error
    sizes, extends = content.pop("sizes", {}), content.pop("extends", None)
    if extends is None:
        return Recipe(path.stem, content, sizes)
    under = read(extends, (*above, name))
    kept = {name: size for name, size in under.sizes.items() if "like" not in sizes.get(name, {})}
    return Recipe(path.stem, merge(under.common, content), merge(kept, sizes))


def load(name: str, size: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a recipe at a size with overrides such as `responses.n=8` into a full configuration.

    Raises ConfigError with each wrong field, what was expected and what came.
    """
    name, fixed_size = SHORTCUTS.get(name, (name, None))
    recipe = read(name)
    size = size or fixed_size or ("small" if "small" in recipe.sizes else next(iter(recipe.sizes), ""))
    if recipe.sizes and size not in recipe.sizes:
        raise ConfigError(f"recipe {recipe.name!r}: expected a size of {', '.join(recipe.sizes)}, got {size!r}.")
    settings = merge(recipe.common, _of_size(recipe, size), {"recipe": recipe.name, "size": size})
    for override in overrides:
        settings = merge(settings, parse_override(override))
    return validate(settings)


def _of_size(recipe: Recipe, size: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a size changes, laid over the size that it is like."""
    if size in above:
        raise ConfigError(f"recipe {recipe.name!r}: expected a size, got a circle: {' > '.join([*above, size])}.")
    chosen = {key: value for key, value in recipe.sizes.get(size, {}).items() if key != "description"}
    like = chosen.pop("like", None)
    if like is not None and like not in recipe.sizes:
        raise ConfigError(f"recipe {recipe.name!r}: expected a size of {', '.join(recipe.sizes)}, got like={like!r}.")
    return merge(_of_size(recipe, like, (*above, size)), chosen) if like else chosen


def validate(settings: Mapping[str, Any]) -> RunConfig:
    """Check settings against the tree; every wrong field in one message."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_spell(problem) for problem in error.errors())) from None


def _spell(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, list(_all_fields()), n=3, cutoff=0.6)
        return f"unknown setting {where!r}." + (
            f" Did you mean {' or '.join(near)}?" if near else " See `srlm recipes --settings`."
        )
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "password_in_address":
        return f"{where}.{problem['msg']}"
    return f"{where}: expected {problem['msg'].removeprefix('Input should be ')}, got {problem['input']!r}."


def _all_fields() -> list[str]:
    def walk(model: Any, prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            found += walk(inner, f"{prefix}{name}.") if hasattr(inner, "model_fields") else [f"{prefix}{name}"]
        return found

    return walk(RunConfig, "")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over one another, deep."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merge(result[key], value) if both else value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """Read `responses.n=8`; the value is TOML, or else a plain string."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"expected an override as key=value, such as responses.n=8, got {text!r}.")
    value = value.strip()
    try:
        parsed: Any = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = None if value == "null" else value
    for key in reversed(name.strip().split(".")):
        parsed = {key: parsed}
    return parsed
