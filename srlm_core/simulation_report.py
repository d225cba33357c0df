"""simulation_report: what came of the simulated campaigns: tables and plots with intervals, and answers read off them.

An answer is yes, no or in part by rules that look at 95 % intervals alone; they were written before the first run.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import stdtrit

from srlm_core import pages, report_figures, store
from srlm_core.report_figures import BAD, EVEN, FAINT, GOOD, INK, MAIN, SECOND, Figure
from srlm_core.simulation import ARMS, ASSUMPTIONS, FLAWS, MEASURES, Row, World
from srlm_core.spelling import in_columns


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{_signed(self.mean)} [{_signed(self.low)}, {_signed(self.high)}]"


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return mean and mean ± t(0.975, n - 1) s / sqrt(n); 1, 2, 3 give 2 ± 4.3027 * 0.57735. Needs two values."""
    found = np.asarray(values, dtype=float)
    half = stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / np.sqrt(len(found))
    return Interval(float(found.mean()), float(found.mean() - half), float(found.mean() + half), len(found))


class Ends:
    """What each arm came to at its last model, seed by seed, so that differences are paired."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._of: dict[tuple[str, str, float, str], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        last = World().iterations + 1
        for row in rows:
            if row["model"] == last:
                of = self._of[row["assumption"], row["flaw"], row["strength"], row["arm"]]
                for measure in MEASURES:
                    of[measure].append(row[measure])
        self.flaws = [flaw for flaw in FLAWS if any(key[1] == flaw for key in self._of)]

    def values(self, flaw: str, strength: float, arm: str, measure: str, assumption: str = "") -> np.ndarray:
        """Return one value a seed; NaN where the arm has none."""
        return np.array(self._of[assumption, flaw, float(strength), arm][measure], dtype=float)

    def of(self, flaw: str, strength: float, arm: str, measure: str) -> Interval:
        """Return what the arm came to."""
        return interval(self.values(flaw, strength, arm, measure))

    def gap(self, flaw: str, strength: float, arms: tuple[str, str], measure: str, assumption: str = "") -> Interval:
        """Return how far the first arm lies above the second, seed by seed."""
        first, second = (self.values(flaw, strength, arm, measure, assumption) for arm in arms)
        return interval(first - second)


# --- the questions --------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What a question finds at one strength."""

    strength: float
    claim: bool | None
    """Null where the question does not arise."""
    said: str
    gap: Interval
    """The difference that the claim is about."""
    text: str


class Answer(NamedTuple):
    """A question, its answer in a line, and what it rests on."""

    question: str
    answer: str
    findings: list[Finding]


def _in_a_line(findings: Sequence[Finding]) -> str:
    known = [finding for finding in findings if finding.claim is not None]
    if not known:
        return "It does not arise: at no strength happened what was to be prevented."
    claimed = sum(finding.claim is True for finding in known)
    word = "Yes" if claimed == len(known) else "In part" if claimed else "No"
    where: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        where[finding.said].append(f"{finding.strength:g}")
    gaps = sorted(finding.gap.mean for finding in known)
    size = f"The difference is {_signed(gaps[0])}" + (f" to {_signed(gaps[-1])}" if len(gaps) > 1 else "")
    each = "; ".join(f"{said} at {', '.join(at)}" for said, at in where.items())
    return f"{word}: {each}. {size}."


PLAIN, HALF, RHO, CREAM, HARD = "self_rewarding", "self_rewarding_half", "self_rewarding_rho", "cream", "cream_hard"
META = "meta_rewarding", "meta_rewarding_judge_kept"


def length_held(ends: Ends, flaw: str, strength: float) -> Finding:
    """Ask of rho: where plain self-rewarding ends longer than M1, does it end no longer than M1?"""
    plain, held = (ends.of(flaw, strength, arm, "length") for arm in (PLAIN, RHO))
    gap, price = (ends.gap(flaw, strength, (RHO, PLAIN), measure) for measure in ("length", "quality"))
    claim = held.low <= 1 if plain.low > 1 else None
    said = {None: "plain does not inflate", True: "held", False: "slowed" if gap.high < 0 else "not held"}[claim]
    text = f"{plain} times M1's length without rho, {held} with it; difference {gap}. True quality: {price} points."
    return Finding(strength, claim, said, gap, text)


def collapse_prevented(ends: Ends, flaw: str, strength: float, of: str = PLAIN) -> Finding:
    """Ask of CREAM: where `of` ends worse than M1, does it end no worse than M1, and better than that?"""
    start = World().start
    other, half, cream = (ends.of(flaw, strength, arm, "quality") for arm in (of, HALF, CREAM))
    gap, beyond = (ends.gap(flaw, strength, (CREAM, arm), "quality") for arm in (of, HALF))
    claim = cream.high >= start and gap.low > 0 if other.high < start else None
    said = {None: "no collapse", True: "kept", False: "lost less" if gap.low > 0 else "not kept"}[claim]
    trust, far, farther = (
        ends.of(flaw, strength, arm, measure) for arm, measure in ((CREAM, "label"), (CREAM, "drift"), (of, "drift"))
    )
    return Finding(
        strength, claim, said, gap,
        f"of M1's {start:.2f} points without CREAM {other}, with it {cream}; difference {gap}. Drift {farther} and "
        f"{far} nats, last C {trust}. Plain self-rewarding at half the step: {half}; CREAM against that: {beyond}.",
    )  # fmt: skip


def own_collapse_prevented(ends: Ends, flaw: str, strength: float) -> Finding:
    """Ask the same against CREAM's own reward, its labels trusted wholly."""
    return collapse_prevented(ends, flaw, strength, HARD)


def judge_helped(ends: Ends, flaw: str, strength: float) -> Finding:
    """Ask of meta-judging: does true quality end higher than without judge training?"""
    quality, error, bias, fresh = (
        ends.gap(flaw, strength, META, measure) for measure in ("quality", "judge_error", "judge_bias", "judge_fresh")
    )
    return Finding(
        strength, quality.low > 0, _helps(quality), quality,
        f"true quality {quality} points; share of pairs misjudged {error}; points written too high {bias}; noise of a "
        f"judgment {fresh}.",
    )  # fmt: skip


def judge_helped_by_more(ends: Ends, flaw: str, strength: float) -> Finding:
    """Ask: by more than where the flaw is none? The noise that is beside it then gives meta-judging work as well."""
    here, without = (
        ends.values(flaw, at, META[0], "quality") - ends.values(flaw, at, META[1], "quality") for at in (strength, 0)
    )
    more = interval(here - without)
    return Finding(
        strength, more.low > 0, _helps(more), more, f"true quality {more} points more than without the flaw."
    )


def _helps(by: Interval) -> str:
    return "helps" if by.low > 0 else "harms" if by.high < 0 else "nothing to be shown"


QUESTIONS: tuple[tuple[str, str, Callable[[Ends, str, float], Finding]], ...] = (
    ("Does rho hold length where plain self-rewarding inflates it?", "length", length_held),
    (
        "Does CREAM keep true quality from collapsing under noise, where self-rewarding does?",
        "noise",
        collapse_prevented,
    ),
    ("… and where its own reward does, trusted wholly?", "noise", own_collapse_prevented),
    ("Does meta-judging help true quality against noise?", "noise", judge_helped),
    ("Does meta-judging help true quality against leniency?", "leniency", judge_helped),
    ("… and by more than it helps without leniency?", "leniency", judge_helped_by_more),
)
"""The third and the last were added after the first run. Where no judge collapsed, CREAM's own reward had; and what
helped under leniency had also helped without."""


def answers(ends: Ends) -> list[Answer]:
    """Answer each question whose flaw was run; where the flaw is none, a finding and no claim."""
    found: list[Answer] = []
    for question, flaw, ask in QUESTIONS:
        if flaw in ends.flaws:
            findings = [ask(ends, flaw, strength) for strength in FLAWS[flaw].strengths]
            line = _in_a_line([finding for finding in findings if finding.strength])
            without = [f if f.strength else f._replace(claim=None, said="without the flaw") for f in findings]
            found.append(Answer(question, line, without))
    return found


class Effect(NamedTuple):
    """A difference of two arms on a flaw, which an answer rests on."""

    what: str
    flaw: str
    arms: tuple[str, str]
    measure: str


EFFECTS = (
    Effect("rho: length, times M1's", "length", (RHO, PLAIN), "length"),
    Effect("CREAM under noise: true quality", "noise", (CREAM, PLAIN), "quality"),
    Effect("… against its reward trusted wholly", "noise", (CREAM, HARD), "quality"),
    Effect("… against plain at half the step", "noise", (CREAM, HALF), "quality"),
    Effect("meta-judging under noise: true quality", "noise", META, "quality"),
    Effect("… share of pairs misjudged", "noise", META, "judge_error"),
    Effect("meta-judging under leniency: true quality", "leniency", META, "quality"),
    Effect("… points written too high", "leniency", META, "judge_bias"),
)
PROBES: dict[str, tuple[str, ...]] = {
    flaw: tuple(dict.fromkeys(arm for effect in EFFECTS if effect.flaw == flaw for arm in effect.arms))
    for flaw in dict.fromkeys(effect.flaw for effect in EFFECTS)
}
"""Flaw to the arms that are run under each assumption, too."""


def assumptions(ends: Ends) -> list[list[str]]:
    """Lay out each effect at its flaw's third strength: in the world as it is, and under each assumption."""
    shown = [effect for effect in EFFECTS if effect.flaw in ends.flaws]
    if not shown:
        return []
    rows = [["assumption", *(effect.what for effect in shown)]]
    for assumption in ("", *ASSUMPTIONS):
        gaps = [ends.gap(e.flaw, FLAWS[e.flaw].strengths[2], e.arms, e.measure, assumption) for e in shown]
        rows.append([assumption or "none: the world as fixed", *map(str, gaps)])
    return rows


# --- tables and plots -----------------------------------------------------------------------------------------------

SHOWN = {"length": "length, times M1's", "quality": "true quality, points", "judge_error": "pairs misjudged, share"}


def table(ends: Ends, flaw: str, measure: str) -> list[list[str]]:
    """Lay out one measure at the end: an arm a row, a strength a column, ± half the 95 % interval."""
    strengths = FLAWS[flaw].strengths
    rows = [[SHOWN[measure], *(f"{strength:g}" for strength in strengths)]]
    for arm in ARMS:
        found = [ends.of(flaw, strength, arm, measure) for strength in strengths]
        rows.append([arm, *(f"{_signed(one.mean)} ± {one.high - one.mean:.2f}" for one in found)])
    return rows


_LOOKS: Mapping[str, tuple[str, str]] = {
    "oracle": (FAINT, "-"),
    "random": (FAINT, ":"),
    PLAIN: (MAIN, "-"),
    RHO: (MAIN, "--"),
    HALF: (MAIN, ":"),
    CREAM: (SECOND, "-"),
    "cream_pair": (SECOND, ":"),
    HARD: (SECOND, "--"),
    "meta_rewarding": (GOOD, "-"),
    "meta_rewarding_judge_kept": (GOOD, "--"),
}
"""A colour for a family, dashes for a member of it."""


def figure(ends: Ends, flaw: str) -> Figure:
    """Draw the ends of all arms over the flaw's strength: length, true quality and the judge's error."""
    strengths = FLAWS[flaw].strengths
    spare = itertools.cycle((BAD, EVEN, INK))

    def paint(canvas: Any) -> None:
        panels = canvas.subplots(1, len(SHOWN))
        for arm in ARMS:
            colour, dash = _LOOKS.get(arm) or (next(spare), "-.")
            for axes, measure in zip(panels, SHOWN, strict=True):
                found = [ends.of(flaw, strength, arm, measure) for strength in strengths]
                axes.errorbar(
                    strengths, [one.mean for one in found], yerr=[one.high - one.mean for one in found], color=colour,
                    linestyle=dash, linewidth=1.4, marker="o", markersize=2.5, capsize=2, elinewidth=1, label=arm,
                )  # fmt: skip
        for axes, title in zip(panels, SHOWN.values(), strict=True):
            axes.set_title(title)
            axes.set_xticks(strengths)
            axes.set_xlabel("strength")
            axes.grid(axis="y")
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=4)

    of = FLAWS[flaw]
    note = f"Strength: {of.unit}. M{World().iterations + 1}, mean and 95 % interval over seeds."
    return report_figures.draw(f"flaw_{flaw}", of.what.capitalize(), note, paint, size=(9.6, 3.9))


# --- the page -------------------------------------------------------------------------------------------------------

TRUST = (
    "It is arithmetic on stated assumptions. It can show that a claim follows from a mechanism, and on what that "
    "hangs; it cannot show that a language model has the mechanism, nor how strong its flaws are.",
    "Responses are points of a normal distribution that keeps its spread: no mode is lost, no text degenerates, "
    "and merit, length and manner are independent. Where longer answers are better, rho costs more than here.",
    "One training is one step along DPO's gradient at Delta = 0. An optimiser that divides by the size of the "
    "gradient, as AdamW does, would undo much of CREAM's factor 2 C - 1 until Delta grows: what this says of it is "
    "nearer to plain gradient descent than to a real training. The arm at half the step shows how much is care alone.",
    "That a model collapses at all rests on the cost of drifting in directions that nobody prefers. Its form is taken "
    "from measurements of over-optimisation; its size was set so that random labels lose what a perfect judge gains.",
    "CREAM's reward is the way that the policy was trained so far, exactly, with noise for what a real log-ratio holds "
    "besides. Most of that way is chance here, for there are many directions and few pairs, and so the reward soon is. "
    "What agreement is worth hangs on how much noise two models share; we know of no measurement of it.",
    "Whether meta-judging helps against leniency hangs on the judge erring less where it compares judgments than where "
    "it writes them. That is the method's premise, not its result; here it errs half as much, and the table below has "
    "both ends.",
    "Training responses does not change the judge here, and training judgments does not change the responses, though "
    "both are one model. Only comparisons know a place, so position bias touches Meta-Rewarding alone.",
    "An interval is over seeds, so it can be narrow around a difference too small to matter. Of many intervals one in "
    "twenty misses by chance.",
)


def as_text(ends: Ends) -> str:
    """Spell tables and answers for a terminal."""
    lines: list[str] = []
    for flaw in ends.flaws:
        lines += ["", f"{FLAWS[flaw].what}: strength is {FLAWS[flaw].unit}"]
        for measure in SHOWN:
            lines += ["", *in_columns(table(ends, flaw, measure))]
    lines += ["", f"At M{World().iterations + 1}, ± half of the 95 % interval over seeds.", ""]
    for answer in answers(ends):
        lines += [answer.question, f"  {answer.answer}"]
        lines += [f"  at {finding.strength:g}, {finding.said}: {finding.text}" for finding in answer.findings] + [""]
    return "\n".join(lines).strip("\n")


def as_dict(ends: Ends) -> dict[str, Any]:
    """Lay out tables, effects and answers for programs."""
    numbers = [
        {"flaw": flaw, "strength": strength, "arm": arm, "measure": measure}
        | ends.of(flaw, strength, arm, measure)._asdict()
        for flaw in ends.flaws
        for strength, arm, measure in itertools.product(FLAWS[flaw].strengths, ARMS, SHOWN)
    ]
    answered = [
        {**a._asdict(), "findings": [{**f._asdict(), "gap": f.gap._asdict()} for f in a.findings]}
        for a in answers(ends)
    ]
    return {"answers": answered, "ends": numbers, "assumptions": assumptions(ends)}


_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("assumption", "flaw")),
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("model", pa.int32(), nullable=False),
        *(pa.field(measure, pa.float64()) for measure in MEASURES),
    ]
)
"""A row for each arm and M_t of each seed; MEASURES are described in srlm_core/simulation.py."""


def write(rows: Sequence[Row], seeds: int, target: Path) -> Path:
    """Write index.html, simulation.md, figures and simulation.parquet into a folder; return the path of the page."""
    ends = Ends(rows)
    store.write_atomically(
        target / "simulation.parquet", lambda aside: pq.write_table(pa.Table.from_pylist(list(rows), _SCHEMA), aside)
    )
    figures = {flaw: figure(ends, flaw) for flaw in ends.flaws}
    content = {
        "seeds": seeds,
        "answers": answers(ends),
        "flaws": {flaw: FLAWS[flaw] for flaw in ends.flaws},
        "tables": {flaw: [table(ends, flaw, measure) for measure in SHOWN] for flaw in ends.flaws},
        "assumptions": assumptions(ends),
        "trust": TRUST,
        "arms": ARMS,
        "world": asdict(World()),
    }
    return pages.write(target, "simulation", content, {one.name: one for one in figures.values()})
