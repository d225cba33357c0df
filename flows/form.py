"""The run form: what a person fills in to start a flow from Prefect's pages.

Each field is plain (a number, a text, a choice), so that the page draws it as one, and carries its bounds, so that the
server refuses what cannot work before a run is made. An empty field is the recipe's own value.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model, model_serializer
from pydantic.json_schema import SkipJsonSchema

from srlm_core import recipes, settings
from srlm_core.config import PASSWORD, RunConfig
from srlm_core.errors import ConfigError

OFFERED = (
    "iterations", "seed", "model.path", "prompts.target", "prompts.file", "prompts.file_share", "responses.n",
    "responses.sampling.temperature", "responses.sampling.max_tokens", "judgments.k", "judgments.reading",
    "pairs.min_margin", "pairs.length_control", "training.sft.learning_rate", "training.dpo.learning_rate",
    "training.dpo.beta", "training.dpo.epochs", "engine.kind", "engine.replicas", "engine.tensor_parallel",
    "engine.context", "evaluation.models", "evaluation.judge",
)  # fmt: skip
"""Settings with a field of their own; all others go by `overrides`."""
NAME = r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$"
"""A campaign's name: one folder below the root, nowhere else; empty where the name is left open."""

NO_PASSWORD = rf"^((?!{PASSWORD})[\s\S])*$"
"""Parameters of flow runs are kept: an address with a password is refused before there is a run."""


def root() -> Path:
    """Return the folder of all campaigns on this machine: SRLM_ROOT, or `runs`. A form cannot choose another one."""
    return Path(os.environ.get("SRLM_ROOT", "runs"))


def own_recipes() -> dict[str, Path]:
    """Find the team's own recipes: TOML files in the folder `recipes` below the root."""
    return {path.stem: path for path in sorted((root() / "recipes").glob("*.toml"))}


def offered_recipes() -> list[str]:
    """List what the form offers: shortcuts, the recipes that ship, the team's own."""
    return [*recipes.SHORTCUTS, *recipes.names(), *own_recipes()]


def recipe_file(name: str) -> str:
    """Return what `recipes.load` finds a form's recipe by. Raises ConfigError, naming what there is."""
    known = [*recipes.SHORTCUTS, *recipes.names()]
    if name in known:
        return name
    if name in (mine := own_recipes()):
        return str(mine[name])
    raise ConfigError(
        f"recipe: expected one of {', '.join([*known, *mine])}, got {name!r}. Choose another one, or put {name}.toml "
        f"into {root() / 'recipes'} and deploy again."
    )


def _recipe(name: str) -> str:
    try:
        recipe_file(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


def _as_the_page_needs_it(position: int, schema: dict[str, Any]) -> None:
    schema.pop("default", None)
    schema["position"] = position  # PostgreSQL keeps the fields, and not their order
    if schema.get("type") == "string" and "enum" not in schema:
        schema["pattern"] = NO_PASSWORD


# --- one field for each setting that is offered -----------------------------------------------------------------------


class _Form(BaseModel):
    """Empty fields are left out: the page would show them as null, and the server refuse them as no number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True,
        json_schema_extra={"dependentRequired": {"prompts_file": ["prompts_file_share"]}},
    )  # fmt: skip

    @model_serializer(mode="wrap")
    def _filled_in(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


def _field(position: int, name: str) -> tuple[Any, Any]:
    """Make a form's field of a setting: its type without null, its bounds, its description, no default."""
    *nodes, last = name.split(".")
    model: Any = RunConfig
    for node in nodes:
        model = model.model_fields[node].annotation
    found = model.model_fields[last]
    kinds = [kind for kind in get_args(found.annotation) if kind is not NoneType]
    kind = found.annotation if get_origin(found.annotation) is Literal or not kinds else kinds[0]
    bounded = Annotated[(kind, *found.metadata)] if found.metadata else kind
    shown = partial(_as_the_page_needs_it, position)
    described = Field(default=None, title=name, description=found.description, json_schema_extra=shown)
    return bounded | SkipJsonSchema[None], described


if TYPE_CHECKING:
    Changed = _Form
else:
    Changed = create_model(
        "Settings", __base__=_Form, __doc__="What differs from the recipe. Empty: the recipe's own value.",
        **{name.replace(".", "_"): _field(position, name) for position, name in enumerate(OFFERED)},
    )  # fmt: skip
"""Typed overrides: `responses_n` for `responses.n`, and so on."""
NOTHING = Changed()


if TYPE_CHECKING:
    Named = str
else:
    Named = Literal[tuple(sorted(settings.flat(RunConfig())))]


class Override(BaseModel):
    """A setting that has no field of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: Annotated[Named, Field(description="Its name, as `srlm recipes --settings` lists them.")]
    value: Annotated[
        str,
        Field(description='As in TOML: 8, 0.7, true, ["a", "b"]; or plain text, null for none.'),
        WithJsonSchema({"type": "string", "pattern": NO_PASSWORD}),
    ]

    def __str__(self) -> str:
        return f"{self.setting}={self.value}"


class OverrideOf(Override):
    """The same, of one recipe among several."""

    recipe: Annotated[str, Field(description="Empty: of all recipes.")] = ""

    def __str__(self) -> str:
        return f"{self.recipe}:{super().__str__()}" if self.recipe else super().__str__()


def spelled(changed: BaseModel, more: Sequence[Override] = ()) -> list[str]:
    """Spell what a form changes as `recipes.load` reads it: `responses.n=8`; what is said last holds.

    Raises ConfigError for a path that a form may not name.
    """
    names = {name.replace(".", "_"): name for name in OFFERED}
    for each in more:
        _look_at_paths(recipes.parse_override(f"{each.setting}={each.value}"))
    typed = {names[field]: value for field, value in changed.model_dump().items()}
    placed = {name: path_below(value) if isinstance(value, str) else value for name, value in typed.items()}
    return [*(f"{name}={json.dumps(value)}" for name, value in placed.items()), *map(str, more)]


def _look_at_paths(value: Any) -> None:
    if isinstance(value, str):
        path_below(value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _look_at_paths(inner)


def path_below(text: str) -> str:
    """Return what a form's text names, where it is a path: relative ones lie below the root.

    Whoever fills in a form need not have an account on the worker's machine, so a path may lie below the root or the
    folders in SRLM_PATHS alone. Raises ConfigError for any other. Hub ids, endpoints and words pass as they are.
    """
    path = Path(text).expanduser()
    if not path.is_absolute() and ".." not in path.parts:
        below = root().resolve() / path
        return str(below) if len(path.parts) > 1 and below.exists() else text
    folders = [root(), *map(Path, filter(None, os.environ.get("SRLM_PATHS", "").split(os.pathsep)))]
    if not any(path.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ConfigError(
            f"expected a path below {' or '.join(str(folder) for folder in folders)}, got {text!r}. Put the file "
            "there, or have the worker's SRLM_PATHS name its folder."
        )
    return text


def as_asked(overrides: Mapping[str, Any]) -> list[dict[str, str]]:
    """Show settings, dotted name to value, as the form's `overrides` would ask for them."""
    return [{"setting": name, "value": json.dumps(value)} for name, value in overrides.items()]


# --- the parameters that flows share ----------------------------------------------------------------------------------

Recipe = Annotated[str, AfterValidator(_recipe), WithJsonSchema({"type": "string", "enum": offered_recipes()})]
Size = Literal["", "smoke", "demo", "small", "node", "paper"]
"""Empty: the recipe's own."""
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
