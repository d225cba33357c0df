"""The report's figures: SVG from matplotlib, the same bytes for the same numbers, in colours that the page decides.

Figures are drawn in stand-in colours. Inside the page these become its CSS variables, so that light and dark both
read well; in the files beside it, plain colours on white.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from srlm_core.summary import Mean, Summary, spearman

INK, FAINT, GRID, PAGE, MAIN, SECOND, GOOD, EVEN, BAD = (f"#{0x010101 * n:06x}" for n in range(1, 10))
_COLOURS = {
    INK: ("--ink", "#1d2530"),
    FAINT: ("--faint", "#667080"),
    GRID: ("--line", "#d9dee5"),
    PAGE: ("--page", "#ffffff"),
    MAIN: ("--main", "#2f6db3"),
    SECOND: ("--second", "#c2722a"),
    GOOD: ("--good", "#2f8a5b"),
    EVEN: ("--even", "#b6bec9"),
    BAD: ("--bad", "#b8483e"),
}
"""Stand-in to (CSS variable, colour in the files)."""

_SERIES = (MAIN, SECOND, GOOD, BAD, FAINT, EVEN)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": FAINT,
    "xtick.bottom": False,
    "ytick.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class Figure(NamedTuple):
    """One figure: as a file of its own, and as it stands in the page."""

    name: str
    title: str
    note: str
    file: str
    inline: str


def draw(
    name: str, title: str, note: str, paint: Callable[[Any], None], *, size: tuple[float, float] = (7.2, 2.9)
) -> Figure:
    """Draw one figure, `size` in inches. Equal input gives equal bytes."""
    style: Any = {**_STYLE, "svg.hashsalt": f"srlm {name}"}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        paint(canvas)
        sink = io.StringIO()
        canvas.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _finished(name, title, note, sink.getvalue())


def _finished(name: str, title: str, note: str, svg: str) -> Figure:
    svg = re.sub(
        r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL
    )
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif").strip() + "\n"
    file, inline = svg, svg
    for stand_in, (variable, colour) in _COLOURS.items():
        file, inline = file.replace(stand_in, colour), inline.replace(stand_in, f"var({variable})")
    file = re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', file, count=1)
    # a style inside the page would reach beyond its figure; the page has this one itself
    inline = re.sub(r"\s*<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", inline)
    # ids are unique in a file, and must be in a page of several
    inline = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", inline)
    inline = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inline)
    inline = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', inline, count=1
    )
    return Figure(name, title, note, file, inline)


def all_figures(
    found: Summary,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    tokens: Mapping[str, Sequence[int]],
    matches: Mapping[tuple[str, str], Mapping[str, Any]],
    timings: Mapping[str, float],
) -> dict[str, Figure]:
    """Draw what there are numbers for; a figure without numbers is left out."""
    drawn = (
        judge_accuracy(found),
        score_histogram(found),
        length_and_score(found),
        response_length(tokens),
        training_curves(curves),
        head_to_head(matches),
        minutes(timings),
    )
    return {figure.name: figure for figure in drawn if figure is not None}


def _single(canvas: Any) -> Axes:
    return canvas.subplots()


def _panels(canvas: Any, n: int, wide: int, *, alike: bool = True) -> list[Axes]:
    """Lay out n panels in rows of `wide`, with the same scales where they show the same."""
    grid = canvas.subplots(-(-n // wide), wide, sharex=alike, sharey=alike, squeeze=False)
    for unused in grid.flat[n:]:
        unused.set_visible(False)
    return list(grid.flat[:n])


def judge_accuracy(found: Summary) -> Figure | None:
    """Accuracy per model with its error, beside the length baseline and the line of guessing."""
    key = "evaluation/judge_pairwise_accuracy"
    shown = [(model, of) for model, of in found.of_model.items() if key in of]
    if not shown:
        return None

    def paint(canvas: Any) -> None:
        axes = _single(canvas)
        places = range(len(shown))
        for name, label, colour, shape, shift in (
            (f"{key}_tie_half", "a tie is half right", MAIN, "o", -0.12),
            (key, "a tie is wrong", SECOND, "s", 0.0),
            ("evaluation/longer_accuracy", "the longer response", FAINT, "D", 0.12),
        ):
            axes.errorbar(
                [place + shift for place in places],
                [of.get(name, float("nan")) for _, of in shown],
                yerr=[of.get(f"{name}_stderr", 0.0) for _, of in shown],
                fmt=shape, color=colour, markersize=5, capsize=3, elinewidth=1.3, label=label,
            )  # fmt: skip
        axes.axhline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            "guessing", (1, 0.5), (4, 0), ("axes fraction", "data"), "offset points", va="center", color=FAINT
        )
        axes.set_xticks(places, [model for model, _ in shown])
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_ylabel("share of held-out pairs")
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)

    note = "Held-out pairs put in the order of their ranking, ± one standard error (prompts resampled)."
    return draw("judge_accuracy", "Judge accuracy", note, paint)


def score_histogram(found: Summary) -> Figure | None:
    """Readable verdicts per rubric point, one panel per iteration."""
    shown = [(t, counts.histogram) for t, counts in found.iterations.items() if counts.histogram]
    if not shown:
        return None
    wide = min(len(shown), 4)
    high = -(-len(shown) // wide)

    def paint(canvas: Any) -> None:
        panels = _panels(canvas, len(shown), wide)
        for (t, histogram), axes in zip(shown, panels, strict=True):
            total = sum(histogram.values())
            points = range(6)
            axes.bar(points, [histogram.get(point, 0) / total for point in points], color=MAIN, width=0.72)
            axes.set_title(f"iteration {t}, M{t} judges (n = {total})")
            axes.set_xticks(points)
            axes.grid(axis="y")
        panels[0].set_ylabel("share of verdicts")

    note = "Verdicts in rubric points, rounded; unreadable ones are not in it."
    return draw("score_histogram", "Scores that the judge gave", note, paint, size=(7.2, 0.7 + 1.7 * high))


def length_and_score(found: Summary) -> Figure | None:
    """Score against length of the responses, one panel per iteration; its size does not depend on their number."""
    shown = [(t, counts.score_and_length) for t, counts in found.iterations.items() if counts.score_and_length]
    if not shown:
        return None
    wide = min(len(shown), 3)
    high = -(-len(shown) // wide)
    longest = max(length for _, cells in shown for _, length in cells)

    def paint(canvas: Any) -> None:
        panels = _panels(canvas, len(shown), wide)
        for (t, cells), axes in zip(shown, panels, strict=True):
            _paint_cells(axes, cells, longest)
            pull = spearman(cells)
            axes.set_title(f"iteration {t}" + ("" if pull is None else f", Spearman {pull:.2f}"))
            axes.grid(axis="y")
            axes.set_ylim(-0.3, 5.3)
        for axes in panels[-wide:]:
            axes.set_xlabel("tokens")
        panels[0].set_ylabel("score")

    note = (
        "Responses of the loop: a disc for those near a length and score; the line is the mean score of each fifth "
        "by length, ± one standard error. A judge that pays for length rises to the right."
    )
    return draw("length_and_score", "Length against score", note, paint, size=(7.2, 0.9 + 1.9 * high))


def _paint_cells(axes: Axes, cells: Mapping[tuple[float, int], int], longest: int) -> None:
    """Paint responses, counted by (score, tokens), as discs on a grid of 24 lengths by quarter points."""
    step = longest / 24 or 1
    discs: Counter[tuple[int, int]] = Counter()
    for (score, length), count in cells.items():
        discs[min(int(length / step), 23), round(score * 4)] += count
    most = max(discs.values())
    axes.scatter(
        [(column + 0.5) * step for column, _ in discs], [row / 4 for _, row in discs],
        s=[60 * count / most for count in discs.values()], color=EVEN, linewidths=0,
    )  # fmt: skip
    fifths = _fifths(cells)
    axes.errorbar(
        [length for length, _, _ in fifths], [score for _, score, _ in fifths], yerr=[error for _, _, error in fifths],
        color=MAIN, marker="o", markersize=4, linewidth=1.4, capsize=2,
    )  # fmt: skip


def _fifths(cells: Mapping[tuple[float, int], int]) -> list[tuple[float, float, float]]:
    """Cut responses into five by length, equal lengths together: mean length, mean score and its error of each."""
    total, before = sum(cells.values()), 0
    parts: dict[int, tuple[Mean, Mean]] = {}
    by_length: dict[int, list[tuple[float, int]]] = {}
    for (score, length), count in cells.items():
        by_length.setdefault(length, []).append((score, count))
    for length in sorted(by_length):
        lengths, scores = parts.setdefault(before * 5 // total, (Mean(), Mean()))
        for score, count in by_length[length]:
            before += count
            for _ in range(count):
                lengths.add(length)
                scores.add(score)
    return [
        (lengths.value or 0.0, scores.value or 0.0, scores.stderr or 0.0)
        for lengths, scores in parts.values()
    ]  # fmt: skip


def response_length(tokens: Mapping[str, Sequence[int]]) -> Figure | None:
    """Spread of response lengths per model."""
    shown = {model: values for model, values in tokens.items() if values}
    if not shown:
        return None

    def paint(canvas: Any) -> None:
        axes = _single(canvas)
        axes.boxplot(
            [list(values) for values in shown.values()],
            orientation="horizontal", widths=0.5, showfliers=False, whis=(5, 95), showmeans=True, patch_artist=True,
            boxprops={"facecolor": GRID, "edgecolor": FAINT}, whiskerprops={"color": FAINT}, capprops={"color": FAINT},
            medianprops={"color": MAIN, "linewidth": 2},
            meanprops={"marker": "D", "markersize": 4.5, "markerfacecolor": SECOND, "markeredgecolor": SECOND},
        )  # fmt: skip
        axes.set_yticks(range(1, len(shown) + 1), [f"{model} (n = {len(values)})" for model, values in shown.items()])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens")
        axes.grid(axis="x")

    note = "Answers to the evaluation prompts: box 25 to 75 %, whiskers 5 to 95 %, line = median, diamond = mean."
    return draw("response_length", "Length of responses", note, paint, size=(7.2, 0.9 + 0.38 * len(shown)))


def training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """Loss of each training; for DPO also how often and by how much chosen is preferred."""
    sft = {model: rows for model, rows in curves.items() if rows and model in ("M1", "sft_baseline")}
    dpo = {model: rows for model, rows in curves.items() if rows and model not in sft}
    panels = [
        (group, column, title, level)
        for group, column, title, level in (
            (sft, "loss", "supervised loss", None),
            (dpo, "loss", "loss of pairs (in DPO ln 2 = no preference)", 0.6931),
            (dpo, "rewards/accuracies", "chosen preferred, share", 0.5),
            (dpo, "rewards/margins", "reward margin", 0.0),
            (dpo, "scir/agreement", "verdict and log-ratios agree, share", 0.5),
            (dpo, "scir/order_flips", "verdicts that the order decides, share", None),
        )
        if any(row.get(column) is not None for rows in group.values() for row in rows)
    ]
    if not panels:
        return None
    high = -(-len(panels) // 2)

    def paint(canvas: Any) -> None:
        drawn = _panels(canvas, len(panels), 2, alike=False)
        for (group, column, title, level), axes in zip(panels, drawn, strict=True):
            for (model, rows), colour in zip(group.items(), _SERIES * 4, strict=False):
                points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
                few = {"marker": "o", "markersize": 3} if len(points) < 12 else {}
                axes.plot(
                    [x for x, _ in points], [y for _, y in points], color=colour, linewidth=1.4, label=model, **few
                )
            if level is not None:
                axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            axes.set_title(title)
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
            axes.legend(loc="best")
        for axes in drawn[-2:]:
            axes.set_xlabel("optimizer step")

    note = "One point per logged step; a single step of one batch is noisy."
    return draw("training", "Training", note, paint, size=(7.2, 0.3 + 2.1 * high))


def head_to_head(matches: Mapping[tuple[str, str], Mapping[str, Any]]) -> Figure | None:
    """Wins, ties and losses of each comparison."""
    shown = {pair: tally for pair, tally in matches.items() if tally["win"]["n"]}
    if not shown:
        return None

    def paint(canvas: Any) -> None:
        axes = _single(canvas)
        labels: list[str] = []
        for place, ((newer, older), tally) in enumerate(shown.items()):
            labels.append(f"{newer} against {older} (n = {tally['win']['n']})")
            left = 0.0
            for key, colour in (("win", GOOD), ("tie", EVEN), ("lose", BAD)):
                share = tally[key]["value"]
                axes.barh(place, share, left=left, color=colour, height=0.6, label=key if place == 0 else None)
                if share >= 0.08 and key != "tie":  # there the diamond is
                    axes.text(
                        left + share / 2,
                        place,
                        f"{share:.0%}",
                        ha="center",
                        va="center",
                        color=PAGE,
                        fontsize=8,
                        zorder=4,
                    )
                left += share
            points = tally["win_or_half_tie"]
            axes.errorbar(
                points["value"], place, xerr=1.96 * (points["stderr"] or 0), fmt="D", color=INK, markersize=4,
                capsize=3, elinewidth=1.3, zorder=5,
            )  # fmt: skip
        axes.set_yticks(range(len(shown)), labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1)

    note = (
        "Both orders are judged; where the verdict changes with the order it is a tie. "
        "Diamond: wins and half of the ties, with its 95 % interval."
    )
    return draw("head_to_head", "Head to head", note, paint, size=(7.2, 0.5 + 0.34 * len(shown)))


def minutes(timings: Mapping[str, float]) -> Figure | None:
    """Wall time of each phase. Engine starts lie inside the phases."""
    if not timings or not sum(timings.values()):
        return None
    unit, scale = ("minutes", 60.0) if max(timings.values()) >= 120 else ("seconds", 1.0)

    def paint(canvas: Any) -> None:
        axes = _single(canvas)
        values = [seconds / scale for seconds in timings.values()]
        colours = [EVEN if name == "engine starts" else MAIN for name in timings]
        bars = axes.barh(range(len(values)), values, color=colours, height=0.62)
        axes.bar_label(bars, fmt="%.1f" if max(values) >= 10 else "%.2f", padding=3, fontsize=8, color=FAINT)
        axes.set_yticks(range(len(values)), [f"{name}*" if name == "engine starts" else name for name in timings])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(axis="x")

    note = "Wall time, summed over attempts. * Engine starts happen inside the phases."
    return draw("minutes", "Where the time went", note, paint, size=(7.2, 0.8 + 0.26 * len(timings)))


class Point(NamedTuple):
    """A model: what was generated until it was there, and its points."""

    model: str
    tokens: float
    points: float
    stderr: float | None


def over_tokens(lines: Mapping[str, Sequence[Point]]) -> Figure:
    """Draw points over generated tokens, a line for each method, a marker for each of its models."""

    def paint(canvas: Any) -> None:
        axes = _single(canvas)
        for number, (name, points) in enumerate(lines.items()):
            dash = ("-", "--", ":")[number // len(_SERIES) % 3]
            axes.errorbar(
                [point.tokens for point in points],
                [point.points for point in points],
                yerr=[float("nan") if point.stderr is None else point.stderr for point in points],
                marker="o", linestyle=dash, color=_SERIES[number % len(_SERIES)], markersize=5, capsize=3,
                elinewidth=1.3, linewidth=1.3, label=name,
            )  # fmt: skip
            for point in points:
                axes.annotate(
                    point.model, (point.tokens, point.points), (4, 4), textcoords="offset points", fontsize=8,
                    color=FAINT,
                )  # fmt: skip
        axes.axhline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.set_xlabel("tokens generated to train on, until the model was there")
        axes.set_ylabel("share of points")
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)

    note = "Head to head against sft_baseline, a tie counts 1/2; mean over seeds ± one standard error where it has one."
    return draw("over_tokens", "Points over generated tokens", note, paint, size=(7.2, 3.4))


def by_campaign(
    name: str, title: str, unit: str, metric: str, campaigns: Mapping[str, Summary], *, level: float | None
) -> Figure | None:
    """Draw one measure by model, a colour for each campaign; `level` is the line of no effect."""
    known = {
        campaign: {model: of for model, of in found.of_model.items() if metric in of}
        for campaign, found in campaigns.items()
    }
    models = list(dict.fromkeys(model for of in known.values() for model in of))
    if not models:
        return None

    def paint(canvas: Any) -> None:
        axes = _single(canvas)
        for number, (campaign, of) in enumerate(known.items()):
            shift = (number - (len(known) - 1) / 2) * min(0.16, 0.6 / len(known))
            axes.errorbar(
                [models.index(model) + shift for model in of],
                [metrics[metric] for metrics in of.values()],
                yerr=[metrics.get(f"{metric}_stderr", 0.0) for metrics in of.values()],
                fmt="o", color=_SERIES[number % len(_SERIES)], markersize=5, capsize=3, elinewidth=1.3, label=campaign,
            )  # fmt: skip
        if level is not None:
            axes.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.set_xticks(range(len(models)), models)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)

    return draw(name, title, f"{title}: {unit}, ± one standard error where it has one.", paint)
