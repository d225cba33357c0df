"""Comparing methods: campaigns that are there are read, recipes are run first, once for each seed.

All are given the same prompts where their method lets them be written; what several campaigns make alike is made by
the first and linked by the others.
"""

import difflib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flows import running
from flows.looking import folder_of, prompts_of, seed_of, taught_rows
from srlm_core import interrupts, recipes, settings, standings
from srlm_core.backend import resolve
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError, StoreError
from srlm_core.methods import METHODS
from srlm_core.plan import generated_tokens, target_for

FORCED = ("campaign:", "recipe:")
"""Before a name that is both, to say which is meant."""


class Asked(NamedTuple):
    """What the user wants to have compared, and how the recipes among it are run."""

    names: Sequence[str]
    size: str | None = None
    seeds: int = 1
    sets: Sequence[str] = ()
    """Overrides; one for a single recipe begins with its name: `cream:responses.n=5`."""
    tokens: int | None = None
    name: str | None = None
    model: str | None = None
    prompts: str | None = None
    redo: bool = False
    use_prefect: bool = True
    use_mlflow: bool = True
    quiet: bool = False
    """Keep what campaigns say out of the standard output."""


class Contender(NamedTuple):
    """A recipe that is run, once for each seed."""

    recipe: str
    config: RunConfig
    planned: float
    """Tokens that the plan expects it to generate to train on."""

    def campaign(self, name: str, seed: int) -> str:
        """Name its campaign of a seed: `compare-smoke-cream-s1`."""
        return f"{name}-{self.config.recipe}-s{seed}"


class Compared(NamedTuple):
    """What came of it."""

    table: list[standings.Row]
    page: Path


Within = Callable[[RunConfig, str, Callable[[], None]], None]
"""Runs a campaign of these settings under its name: as a sub-flow, or just so."""


def compare(root: Path, asked: Asked, within: Within = lambda config, name, run: run()) -> Compared:
    """Run what is to be run, or go on with it, and write one table and page of it all.

    Raises ConfigError or StoreError, before anything is run, for what cannot be compared.
    """
    root = root.resolve()
    found = dict.fromkeys(_what_it_is(root, name) for name in asked.names)
    if len(found) < 2:
        raise StoreError(
            f"expected two campaigns or recipes or more to compare, got {', '.join(asked.names)}. Name another one."
        )
    wanted = [each for each in found if isinstance(each, str)]
    if not wanted:
        folders = [each for each in found if isinstance(each, Path)]
        return _written(folders, root / "comparisons" / "_against_".join(folder.name for folder in folders), {})
    name = asked.name or f"compare-{asked.size or 'small'}"
    contenders = {each.recipe: each for each in _contenders(wanted, asked)}
    _run_all(root, name, list(contenders.values()), asked, within)
    folders, planned = [], {}
    for each in found:
        if isinstance(each, Path):
            folders.append(each)
            continue
        campaigns = [contenders[each].campaign(name, seed) for seed in range(asked.seeds)]
        folders += [root / campaign for campaign in campaigns]
        planned |= dict.fromkeys(campaigns, contenders[each].planned)
    return _written(folders, root / "comparisons" / name, planned)


def _written(folders: Sequence[Path], target: Path, planned: dict[str, float]) -> Compared:
    table = standings.rows(folders, planned)
    return Compared(table, standings.write(table, target))


# --- what is meant ----------------------------------------------------------------------------------------------------


def _what_it_is(root: Path, name: str) -> Path | str:
    """Return a campaign's folder, or a recipe's name; a campaign where it is both, unless that is said before it."""
    for forced in FORCED:
        if name.startswith(forced):
            rest = name.removeprefix(forced)
            return folder_of(root, rest) if forced == "campaign:" else _known(rest)
    is_recipe = name in (*recipes.names(), *recipes.SHORTCUTS) or name.endswith(".toml")
    try:
        folder = folder_of(root, name)
    except StoreError as error:
        if is_recipe:
            return _known(name)
        near = difflib.get_close_matches(name, [*recipes.names(), *recipes.SHORTCUTS], n=3, cutoff=0.5)
        hint = f"Recipes: {', '.join(near)}." if near else f"Recipes: {', '.join(recipes.names())}."
        raise StoreError(f"{error} {hint}") from error
    if is_recipe:
        sys.stderr.write(f"{name} is a campaign and a recipe: the campaign is read. recipe:{name} would be run.\n")
    return folder


def _known(recipe: str) -> str:
    recipes.read(recipes.SHORTCUTS.get(recipe, (recipe, None))[0])
    return recipe


# --- how it is run ----------------------------------------------------------------------------------------------------


def _contenders(wanted: Sequence[str], asked: Asked) -> list[Contender]:
    """Resolve the recipes, all of them before any is run."""
    for text in asked.sets:
        if text.partition("=")[0].strip() == "seed":
            raise ConfigError(f"--set {text}: a comparison takes the seeds 0 to n - 1. Say how many with --seeds.")
    one_prompt_set = _same_prompts(wanted, asked)
    found: list[Contender] = []
    for recipe in wanted:
        config = resolve(_load(recipe, asked, one_prompt_set))
        found.append(_within_budget(recipe, config, asked.tokens))
    alike = [name for name, count in Counter(one.config.recipe for one in found).items() if count > 1]
    if alike:
        raise ConfigError(
            f"expected recipes of different names, got {', '.join(alike)} twice: their campaigns would be one. "
            "Copy one to a file of another name."
        )
    return found


def _load(recipe: str, asked: Asked, above: Sequence[str] = ()) -> RunConfig:
    writes = _writes(recipe, asked.size)
    own = [f"model.path={json.dumps(asked.model)}"] if asked.model else []
    own += above if writes else []
    own += [f"prompts.file={json.dumps(asked.prompts)}", "prompts.file_share=0.5"] if asked.prompts and writes else []
    return recipes.load(recipe, asked.size, [*own, *_sets_of(recipe, asked.sets)])


def _sets_of(recipe: str, sets: Sequence[str]) -> list[str]:
    """Return the overrides for all, and then those for this recipe alone."""
    split = [(text.partition("=")[0].rpartition(":")[0].strip(), text) for text in sets]
    own = [text.partition(":")[2] for name, text in split if name == recipe]
    return [*(text for name, text in split if not name), *own]


def _writes(recipe: str, size: str | None) -> bool:
    """Whether its prompts are written, and not people's."""
    return METHODS[recipes.load(recipe, size).method].makes[0].role is not None


def _same_prompts(wanted: Sequence[str], asked: Asked) -> list[str]:
    """Spell the settings that let all methods whose prompts are written have the same ones.

    The first one's settings hold for all, and M0 writes: M_t is another model in each.
    """
    first = next((recipe for recipe in wanted if _writes(recipe, asked.size)), None)
    if first is None:
        return []
    how = recipes.load(first, asked.size).prompts.model_dump(mode="json")
    return [
        *(f"prompts.{name}={json.dumps(value)}" for name, value in settings.flatten(how).items()),
        "prompts.generator=base",
    ]


def _within_budget(recipe: str, config: RunConfig, tokens: int | None) -> Contender:
    """Set prompts.target by the budget, and say what the plan makes of it."""
    seed = seed_of(config)
    target = None if tokens is None else target_for(config, taught_rows(config, seed), tokens)
    if target is not None:
        config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"target": target})})
    prompts = prompts_of(config, seed)
    planned = generated_tokens(config, taught_rows(config, seed), prompts)
    sys.stderr.write(f"{recipe}: {' + '.join(map(str, prompts))} prompts, {planned:,.0f} tokens planned\n")
    return Contender(recipe, config, planned)


def _run_all(root: Path, name: str, contenders: Sequence[Contender], asked: Asked, within: Within) -> None:
    """Run each method once for each seed, a seed after the other; each may take what the others of its seed made."""
    running.quiet()
    interrupts.listen()
    for seed in range(asked.seeds):
        campaigns = [contender.campaign(name, seed) for contender in contenders]
        for contender, campaign in zip(contenders, campaigns, strict=True):
            config = contender.config.model_copy(update={"seed": seed})
            others = [other for other in campaigns if other != campaign]

            def run(config: RunConfig = config, campaign: str = campaign, others: list[str] = others) -> None:
                running.carry_out(
                    config, campaign, root, redo=asked.redo, use_prefect=asked.use_prefect,
                    use_mlflow=asked.use_mlflow, as_json=asked.quiet, others=others,
                )  # fmt: skip

            within(config, campaign, run)
