"""standings: methods against one another: a row each over its seeds, what it spent, and what was not alike.

Campaigns whose settings differ in nothing but the seed are one row; of each, the last model counts. Reads the folders.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from srlm_core import comparison, settings, side_by_side, store, summary, weights
from srlm_core.config import RunConfig
from srlm_core.methods import METHODS, method_of
from srlm_core.rates import Rate, rate
from srlm_core.report_figures import Figure, Point, over_tokens
from srlm_core.spelling import escape_markdown, in_columns, spell
from srlm_core.summary import Summary

POINTS = "evaluation/win_rate_vs_sft_baseline"
AT_EQUAL_LENGTH = "evaluation/length_controlled_win_rate_vs_sft_baseline"
ACCURACY = "evaluation/judge_pairwise_accuracy_tie_half"
LOOSE = 1.1
"""Budgets further apart than by this factor are said not to be equal."""

# --- a number over seeds ----------------------------------------------------------------------------------------------


def pooled(found: Iterable[tuple[float | None, float | None]]) -> Rate:
    """Return the mean of (a seed's value, its error within the seed), its standard error, and the number of seeds.

    Variance: s² / n of the spread between seeds, and the mean square of the errors within one. The second is not
    divided by n, for every seed is asked the same prompts: more seeds say nothing about other prompts. So the error is
    never smaller than that of a single seed, and too large, rather than too small, as far as the spread is itself
    chance within a seed. 0.5 ± 0.03, 0.6 ± 0.04, 0.7 ± 0.05: 0.6 ± sqrt(0.1² / 3 + 0.005 / 3) = 0.0707. Null where
    neither part is known, or both are 0: equal values say nothing about the next one.
    """
    known = [(value, error) for value, error in found if value is not None]
    n = len(known)
    if not n:
        return Rate(None, None, 0)
    mean = math.fsum(value for value, _ in known) / n
    between = math.fsum((value - mean) ** 2 for value, _ in known) / (n - 1) / n if n > 1 else 0.0
    within = rate([error**2 for _, error in known if error is not None]).value or 0.0
    return Rate(mean, math.sqrt(between + within) or None, n)


# --- what a campaign spent --------------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """Tokens that a campaign's models generated to train on; evaluation is not in it."""

    prompts: int
    answering: int
    judging: int
    by_iteration: tuple[int, ...]
    """From 0, the judgments of EFT, on."""

    @property
    def total(self) -> int:
        return self.prompts + self.answering + self.judging


def spent(folder: Path, config: RunConfig | None) -> Spent | None:
    """Add up what the parts say they cost, whoever made them; None where one does not say, or an iteration lacks.

    Not from usage.json: that lacks what a killed process counted, and what another campaign made.
    """
    if config is None or config.method not in METHODS:
        return None
    counted: Counter[str] = Counter()
    by_iteration: list[int] = []
    for t in range(config.iterations + 1):
        root = folder / f"iter_{t:02d}" if t else folder / "bootstrap"
        before = counted.total()
        trained = weights.marker(folder, f"M{t + 1}")
        if trained is None:
            return None
        counted["answering"] += trained.get("tokens", 0)  # where a model answers while it trains
        for dataset, kind in _kinds(config, t).items():
            for path in store.parts(root / dataset):
                tokens = store.tokens_of(path)
                if tokens is None:
                    return None
                counted[kind] += tokens
        by_iteration.append(counted.total() - before)
    return Spent(counted["prompts"], counted["answering"], counted["judging"], tuple(by_iteration))


def _kinds(config: RunConfig, t: int) -> dict[str, str]:
    """Say of each dataset of an iteration what its tokens were for."""
    if not t:
        return dict.fromkeys(("modified", "answers", "judgments"), "judging")  # what teaches M1 to judge
    made = method_of(config.at(t)).makes
    return {step.makes: "judging" if step.role == "judge" else "answering" for step in made} | {"prompts": "prompts"}


# --- rows -------------------------------------------------------------------------------------------------------------


class Campaign(NamedTuple):
    """One campaign, read once."""

    folder: Path
    found: Summary
    last: str
    """Its last model; what is not measured of it is not known."""
    seed: int
    spent: Spent | None
    prompts: frozenset[str]
    """Ids of what it was trained on."""
    baseline: str | None
    """Digest of its sft_baseline."""

    @classmethod
    def read(cls, folder: Path) -> "Campaign":
        """Read a folder."""
        found = summary.collect(folder)
        config, marker = found.config, weights.marker(folder, summary.BASELINE)
        last = f"M{config.iterations + 1}" if config else found.models[-1]
        prompts = frozenset(_prompt_ids(folder, found))
        seed = config.seed if config else 0
        return cls(folder, found, last, seed, spent(folder, config), prompts, (marker or {}).get("digest"))

    def measure(self, name: str) -> tuple[float | None, float | None]:
        """Return what was measured of its last model, with its error."""
        of = self.found.of_model.get(self.last, {})
        return of.get(name), of.get(f"{name}_stderr")

    def length(self) -> tuple[float | None, float | None]:
        """Return the mean tokens of its last model's answers to the evaluation prompts, with its error."""
        return rate([row["n_tokens"] for row in side_by_side.answers(self.folder, self.last).values()])[:2]

    def hours(self) -> float | None:
        """Return the hours that it took itself; what another campaign made for it took none here."""
        timings: dict[str, float] = store.read_json(self.folder / "timings.json") or {}
        within = ("engine starts",)
        return sum(seconds for name, seconds in timings.items() if name not in within) / 3600 if timings else None


def _prompt_ids(folder: Path, found: Summary) -> Iterable[str]:
    for t, counts in found.iterations.items():
        if not counts.damaged:
            yield from (row["prompt_id"] for row in store.iter_rows(folder / f"iter_{t:02d}" / "prompts"))


class Row(NamedTuple):
    """One method over its seeds."""

    name: str
    campaigns: tuple[Campaign, ...]
    """One a seed."""
    planned: float | None
    """Tokens that the plan expected."""

    @property
    def first(self) -> Campaign:
        return self.campaigns[0]

    def pooled(self, of: Callable[[Campaign], tuple[float | None, float | None]]) -> Rate:
        """Pool a measure over the seeds."""
        return pooled(of(campaign) for campaign in self.campaigns)

    def tokens(self, of: Callable[[Spent], float] = lambda spent: spent.total) -> Rate:
        """Pool a count of tokens."""
        return self.pooled(lambda campaign: (None if campaign.spent is None else of(campaign.spent), None))


def rows(folders: Sequence[Path], planned: Mapping[str, float] | None = None) -> list[Row]:
    """Put campaigns together that differ in the seed alone, in the order given; `planned`: folder's name to tokens."""
    together: dict[str, list[Campaign]] = {}
    for folder in dict.fromkeys(folders):
        campaign = Campaign.read(folder)
        key = _settings(campaign)
        while any(campaign.seed == other.seed for other in together.get(key, ())):
            key += " "  # the same seed again is no other draw
        together.setdefault(key, []).append(campaign)
    recipes = Counter(_recipe(of[0]) for of in together.values())
    found: list[Row] = []
    for of in together.values():
        of.sort(key=lambda campaign: campaign.seed)
        name = _recipe(of[0])
        expected = [tokens for one in of if (tokens := (planned or {}).get(one.folder.name)) is not None]
        found.append(Row(name if recipes[name] == 1 else of[0].folder.name, tuple(of), rate(expected).value))
    return found


def _recipe(campaign: Campaign) -> str:
    return campaign.found.config.recipe if campaign.found.config else campaign.folder.name


def _settings(campaign: Campaign) -> str:
    """Spell all settings that change what comes out, but the seed."""
    if campaign.found.config is None:
        return str(campaign.folder)
    flat = settings.flat(campaign.found.config)
    counts = {name for name in flat if name in ("recipe", "iterations") or settings.stage_of(name)} - {"seed"}
    return store.canonical({name: flat[name] for name in counts}).decode()


class Alike(NamedTuple):
    """How far the prompts of a row are those of the first row, seed by seed."""

    same: int
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "–"
        return "the same" if self.same == self.n else "others" if not self.same else f"{self.same} of {self.n}"


def alike(row: Row, first: Row) -> Alike:
    """Count the prompts that the first row's campaign of the same seed had, too."""
    theirs = {campaign.seed: campaign.prompts for campaign in first.campaigns}
    both = [(campaign.prompts, theirs[campaign.seed]) for campaign in row.campaigns if campaign.seed in theirs]
    return Alike(sum(len(mine & other) for mine, other in both), sum(len(mine) for mine, _ in both))


# --- what is told -----------------------------------------------------------------------------------------------------


def as_dicts(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Lay out a row per method; each number with its stderr, and n, the seeds that it is over."""
    first, told = table[0], []
    for row in table:
        total, base = row.tokens(), first.tokens().value
        measures = {
            "points": row.pooled(lambda one: one.measure(POINTS)),
            "points_length_controlled": row.pooled(lambda one: one.measure(AT_EQUAL_LENGTH)),
            "judge_accuracy": row.pooled(lambda one: one.measure(ACCURACY)),
            "answer_tokens": row.pooled(Campaign.length),
            "tokens": total,
            "tokens_answering": row.tokens(lambda spent: spent.answering),
            "tokens_judging": row.tokens(lambda spent: spent.judging),
            "hours": row.pooled(lambda one: (one.hours(), None)),
        }  # fmt: skip
        told.append(
            {
                "method": row.name,
                "model": row.first.last,
                "seeds": [campaign.seed for campaign in row.campaigns],
                **{name: found._asdict() for name, found in measures.items()},
                "tokens_of_the_first": total.value / base if total.value is not None and base else None,
                "tokens_planned": row.planned,
                "prompts": alike(row, first)._asdict(),
                "campaigns": [str(campaign.folder) for campaign in row.campaigns],
            }
        )
    return told


_COLUMNS = (
    ("points", "points", ".2f"),
    ("points_length_controlled", "at equal length", ".2f"),
    ("judge_accuracy", "judge accuracy", ".2f"),
    ("answer_tokens", "answer", ".0f"),
    ("tokens", "tokens", ",.0f"),
    ("tokens_answering", "answering", ",.0f"),
    ("tokens_judging", "judging", ",.0f"),
    ("hours", "hours", ".2f"),
)
NOTES = (
    "± is one standard error, of the spread between seeds and of the error within one; – is not known.",
    "Points: head to head against the campaign's own sft_baseline, a tie counts 1/2. Judge accuracy: held-out pairs, "
    "ties as halves, 0.5 is guessing. Answer: mean tokens of an answer.",
    "Tokens: generated to train on, of it for answers and for judgments, and as a ratio to the first; planned: what "
    "srlm plan reckons. Prompts: those that the first method was trained on, too. Hours are those that a campaign took "
    "itself: what several share was made by the first of them.",
)


def grid(table: Sequence[Row]) -> list[list[str]]:
    """Spell the table: a head, and a line per method."""
    head = ["method", "seeds", *(label for _, label, _ in _COLUMNS), "÷ first", "planned", "prompts"]
    lines = [head]
    for row, told in zip(table, as_dicts(table), strict=True):
        cells = [spell(told[key]["value"], told[key]["stderr"], form=form) for key, _, form in _COLUMNS]
        ratio, planned = spell(told["tokens_of_the_first"]), spell(told["tokens_planned"], form=",.0f")
        prompts = str(alike(row, table[0]))
        lines.append([f"{row.name} {row.first.last}", str(len(row.campaigns)), *cells, ratio, planned, prompts])
    return lines


def as_text(table: Sequence[Row]) -> str:
    """Lay the table out for a terminal, with what is to be kept in mind."""
    lines = [[cell.replace(" ± ", "±") for cell in line] for line in grid(table)]
    return "\n".join([*in_columns(lines), *NOTES, "", *(f"! {caveat}" for caveat in caveats(table))])


def as_markdown(table: Sequence[Row]) -> str:
    """Lay the table out in Markdown."""
    head, *body = [[escape_markdown(cell) for cell in line] for line in grid(table)]
    lines = [head, ["---", *("--:" for _ in head[1:])], *body]
    told = [*NOTES, *(f"- {escape_markdown(caveat)}" for caveat in caveats(table))]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *told])


def caveats(table: Sequence[Row]) -> list[str]:
    """Say what was not alike, and what the errors do not hold."""
    everyone = [campaign for row in table for campaign in row.campaigns]
    said: list[str] = []
    single = [row.name for row in table if len(row.campaigns) == 1]
    if single:
        said.append(f"n seeds = 1 ({', '.join(single)}): what two seeds differ by is not in that error")
    for row in table[1:]:
        prompts = alike(row, table[0])
        if prompts.same < prompts.n:
            said.append(f"{row.name}: {prompts.same} of its {prompts.n} prompts are {table[0].name}'s, the rest others")
    for seed in sorted({campaign.seed for campaign in everyone}):
        if len({campaign.baseline for campaign in everyone if campaign.seed == seed and campaign.baseline}) > 1:
            said.append(f"seed {seed}: sft_baseline is not the same model in all: points are against different ones")
    totals = [total for row in table if (total := row.tokens().value) is not None]
    if totals and max(totals) > LOOSE * min(totals):
        said.append(f"budgets are not equal: {min(totals):,.0f} to {max(totals):,.0f} generated tokens")
    folders = [campaign.folder for campaign in everyone]
    found = [campaign.found for campaign in everyone]
    return said + comparison.caveats(folders, dict(zip(comparison.names(folders), found, strict=True)))


def figure(table: Sequence[Row]) -> Figure | None:
    """Draw points against sft_baseline over generated tokens, a line per method and a marker for each M_t."""
    lines: dict[str, list[Point]] = {}
    for row in table:
        last = int(row.first.last.removeprefix("M")) if row.first.last[1:].isdigit() else 0
        for t in range(1, last + 1):
            of = [campaign.found.of_model.get(f"M{t}", {}) for campaign in row.campaigns]
            points = pooled((measured.get(POINTS), measured.get(f"{POINTS}_stderr")) for measured in of)
            tokens = row.tokens(lambda spent, t=t: sum(spent.by_iteration[:t])).value
            if points.value is not None and tokens is not None:
                lines.setdefault(row.name, []).append(Point(f"M{t}", tokens, points.value, points.stderr))
    return over_tokens(lines) if lines else None


def write(table: Sequence[Row], target: Path) -> Path:
    """Write the page: the table over seeds, and below it each method's campaign of its first seed in detail."""
    drawn = figure(table)
    told = {"grid": grid(table), "notes": NOTES, "caveats": caveats(table)}
    return comparison.write_comparison([row.first.folder for row in table], target, standings=told, figure=drawn)
