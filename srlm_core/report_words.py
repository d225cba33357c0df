"""The report's sentences: what the numbers say, what looks wrong, and what they cannot say. Written by rule."""

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from srlm_core.config import RunConfig
from srlm_core.spelling import spell
from srlm_core.summary import BASE, BASELINE, Summary

Matches = Mapping[tuple[str, str], Mapping[str, Any]]


class Measured(NamedTuple):
    """A number with its error and n."""

    value: float
    stderr: float
    n: int

    def __str__(self) -> str:
        return spell(self.value, self.stderr, self.n)

    def beside(self, level: float) -> int:
        """1 above a level, -1 below, 0 where two standard errors cannot tell.

        The error is at least 1/n: that of n equal values is 0, and knows nothing of the next one.
        """
        gap = self.value - level
        return 0 if abs(gap) <= 2 * max(self.stderr, 1 / self.n) else int(math.copysign(1, gap))


def measured(metrics: Mapping[str, float], name: str) -> Measured | None:
    """Look up a number with its error; None where either is not known."""
    value, stderr, n = (metrics.get(f"{name}{end}") for end in ("", "_stderr", "_n"))
    return Measured(value, stderr, int(n)) if value is not None and stderr is not None and n else None


def policies(found: Summary) -> list[str]:
    """List the models of the loop that were evaluated: M1, M2 and so on."""
    return [model for model in found.models if re.fullmatch(r"M[1-9]\d*", model) and found.of_model[model]]


# --- what they say --------------------------------------------------------------------------------------------------


def headline(found: Summary, matches: Matches, by_length: Matches, judge: str | None) -> list[tuple[str, str]]:
    """Say in a few sentences what happened, each group with what it is about."""
    matches = {pair: tally for pair, tally in matches.items() if tally["win_or_half_tie"]["n"]}
    by_length = {pair: by_length[pair] for pair in matches}
    what = _what_it_was(found)
    if found.config and found.config.engine.kind == "scripted":
        what.append("The scripted engine made all of this: it shows that the loop runs, and nothing about models.")
    said = {
        "In short": what,
        "The judge": [*_first_judge(found), *_change_of_judge(found)],
        "Who wins": _who_wins(found, matches, judge),
        "Longer or better": _longer_or_better(found, matches, by_length),
        "Kinder or better": _generosity(found),
    }
    return [(about, " ".join(sentences)) for about, sentences in said.items() if sentences]


def _what_it_was(found: Summary) -> list[str]:
    pairs = {t: int(metrics["pairs/n"]) for t, metrics in found.of_iteration.items() if metrics.get("pairs/n")}
    of = f" of {found.config.model.path}" if found.config and found.config.engine.kind != "scripted" else ""
    if not pairs:
        return [f"This campaign{of} has made no pairs yet."]
    made = " and ".join(f"{count} in iteration {t} (for M{t + 1})" for t, count in pairs.items())
    judged = any(counts.readable.n for counts in found.iterations.values())
    who = "the model made its own pairs to train on" if judged else "these pairs were made to train on"
    return [f"In this campaign{of} {who}: {made}."]


_ACCURACY = "evaluation/judge_pairwise_accuracy"
_HALF = f"{_ACCURACY}_tie_half"
_THAN_GUESSING = {
    1: "which is better than guessing (0.5)",
    0: "which cannot be told from guessing (0.5)",
    -1: "which is worse than guessing (0.5)",
}


def _first_judge(found: Summary) -> list[str]:
    if not policies(found):
        return ["No model of the loop has been evaluated yet."]
    first = policies(found)[0]
    of = found.of_model[first]
    strict, half, longer = (measured(of, name) for name in (_ACCURACY, _HALF, "evaluation/longer_accuracy"))
    if strict is None or half is None:
        return [f"{first} could not be measured as a judge: none of its held-out judgments made a pair of scores."]
    text = (
        f"As a judge, {first} puts {strict} of the held-out pairs in the order of their ranking, counting ties as "
        f"wrong; with ties as halves it is {half}, {_THAN_GUESSING[half.beside(0.5)]}."
    )
    if longer is None:
        return [text]
    gap = half.value - longer.value
    apart = abs(gap) > 2 * math.hypot(half.stderr, longer.stderr)
    against = (
        f"the judge does {'better' if gap > 0 else 'worse'} than that"
        if apart
        else "the judge cannot be told from that"
    )
    return [text, f"Always preferring the longer response scores {longer} on the same pairs: {against}."]


def _change_of_judge(found: Summary) -> list[str]:
    loop = policies(found)
    if len(loop) < 2:
        return []
    first, last = loop[0], loop[-1]
    a, b = measured(found.of_model[first], _HALF), measured(found.of_model[last], _HALF)
    if a is None or b is None:
        return []
    change, error = b.value - a.value, math.hypot(a.stderr, b.stderr)
    said = f"{spell(change, error, form='+.2f')} with ties as halves"
    if abs(change) <= 2 * error:
        return [f"From {first} to {last} the judge's accuracy changes by {said}: no change that these pairs can show."]
    return [f"From {first} to {last} the judge got {'better' if change > 0 else 'worse'}: {said}."]


def _who_wins(found: Summary, matches: Matches, judge: str | None) -> list[str]:
    sentences: list[str] = []
    for other in _opponents(found, matches):
        last = policies(found)[-1]
        tally = matches[last, other]
        if _only_the_order_told(tally):
            sentences.append(
                f"Of {last} against {other} nothing is known: {judge} changed its verdict with the order on all of the "
                f"{tally['win']['n']} prompts, which makes each of them a tie."
            )
            continue
        points = Measured(*(tally["win_or_half_tie"][key] for key in ("value", "stderr", "n")))
        won, tied, lost = (f"{tally[key]['value']:.0%}" for key in ("win", "tie", "lose"))
        verdict = {1: f"{last} wins", 0: "that is even, as far as two standard errors can tell", -1: f"{last} loses"}
        sentences.append(
            f"Against {other}, {last} wins {won}, ties {tied} and loses {lost} of the prompts, {points} with ties as "
            f"halves: {verdict[points.beside(0.5)]}, in the eyes of {judge}."
        )
    return sentences


def _only_the_order_told(tally: Mapping[str, Any]) -> bool:
    return tally["flip_rate"]["value"] == 1


def _opponents(found: Summary, matches: Matches) -> list[str]:
    """Whom the last model met, of sft_baseline, M1 and the model before it."""
    loop = policies(found)
    wanted = [BASELINE, *loop[:1], *loop[-2:-1]]
    return [other for other in dict.fromkeys(wanted) if loop and (loop[-1], other) in matches]


def _longer_or_better(found: Summary, matches: Matches, by_length: Matches) -> list[str]:
    loop = policies(found)
    if len(loop) < 2:
        return []
    first, last = loop[0], loop[-1]
    key = "evaluation/response_length_tokens_mean"
    before, after = found.of_model[first].get(key), found.of_model[last].get(key)
    if not before or after is None:
        return []
    change = after / before - 1
    size = (
        f"are {abs(change):.0%} {'longer' if change > 0 else 'shorter'} than"
        if abs(change) >= 0.05
        else "are as long as"
    )
    text = f"The answers of {last} {size} those of {first} ({after:.0f} tokens on average, against {before:.0f})"
    for other in _opponents(found, by_length):
        if _only_the_order_told(matches[last, other]):
            continue
        split = by_length[last, other]
        both = (split[name] for name in ("longer", "not_longer"))
        longer, rest = (Measured(**told) if told["n"] > 1 else None for told in both)  # one match has no error
        if longer and rest:
            return [
                f"{text}; against {other} it scores {longer} where its answer is the longer one and {rest} where it is "
                f"not, {_what_length_did(longer, rest)}."
            ]
    return [f"{text}."]


def _what_length_did(longer: Measured, rest: Measured) -> str:
    if rest.beside(0.5) > 0:
        return "so it wins without being longer, too"
    if longer.beside(0.5) > 0:
        return "so a win can be shown only where it is longer"
    return "too few of either to say which of the two it is"


_GROWN = {1: "the judge has grown kinder", -1: "the judge has grown stricter", 0: "no change of the judge can be shown"}


def _generosity(found: Summary) -> list[str]:
    own = {t: value for t, of in found.of_iteration.items() if (value := measured(of, "judgments/score_mean"))}
    if len(own) < 2:
        return []
    first, last = min(own), max(own)
    before, after = (measured(found.of_model.get(f"M{t}", {}), "evaluation/score_mean") for t in (first, last))
    rise = Measured(own[last].value - own[first].value, math.hypot(own[first].stderr, own[last].stderr), own[last].n)
    moved = spell(rise.value, rise.stderr, form="+.2f")
    text = f"The scores that the policy gives its own responses move by {moved} from M{first} to M{last}"
    if before is None or after is None:
        return [f"{text}."]
    same = Measured(after.value - before.value, math.hypot(before.stderr, after.stderr), after.n)
    return [
        f"{text}; on the held-out responses, which stay the same, by {spell(same.value, same.stderr, form='+.2f')}: "
        f"{_GROWN[same.beside(0)]}."
    ]


# --- what looks wrong -----------------------------------------------------------------------------------------------


def warnings(found: Summary, matches: Matches) -> list[str]:
    """Name what usually precedes a collapse, where it is seen."""
    signs: list[str] = []
    for t, of in found.of_iteration.items():
        if of.get("judgments/readable_rate", 1) < 0.8:
            signs.append(f"Iteration {t}: only {of['judgments/readable_rate']:.0%} of the judgments could be read.")
        if of.get("judgments/tie_rate", 0) > 0.7:
            signs.append(f"Iteration {t}: {of['judgments/tie_rate']:.0%} of the prompts were dropped as ties.")
        if of.get("responses/truncated_rate", 0) > 0.2:
            signs.append(
                f"Iteration {t}: {of['responses/truncated_rate']:.0%} of the responses were cut at max_tokens."
            )
        if of.get("judgments/score_entropy", 3) < 0.5:
            bits = of["judgments/score_entropy"]
            signs.append(f"Iteration {t}: the judge gives nearly always the same score (entropy {bits:.2f} bits).")
        if of.get("pairs/yield", 1) < 0.2:
            signs.append(f"Iteration {t}: only {of['pairs/yield']:.0%} of the prompts gave a pair to learn from.")
        if of.get("prompts/yield", 1) < 0.3:
            signs.append(f"Iteration {t}: only {of['prompts/yield']:.0%} of the prompts written could be used.")
    loop = policies(found)
    for before, after in pairwise(loop):
        key = "evaluation/response_length_tokens_mean"
        a, b = found.of_model[before].get(key), found.of_model[after].get(key)
        if a and b and b > 1.5 * a:
            signs.append(f"{after} answers at {b / a:.1f} times the length of {before}.")
        tally = matches.get((after, before))
        if tally and tally["win"]["n"] and tally["lose"]["value"] > tally["win"]["value"]:
            signs.append(f"{after} loses to {before} more often than it wins.")
    for model in loop:
        own = measured(found.of_model[model], "evaluation/self_preference")
        if own and own.beside(0) > 0:
            signs.append(f"{model} places its own answers higher among people's than the frozen judge does, by {own}.")
    return signs + _divergence(found)


def _divergence(found: Summary) -> list[str]:
    loop = policies(found)
    signs: list[str] = []
    for before, after in pairwise(loop):
        own = [found.of_iteration.get(int(model[1:]), {}).get("judgments/score_mean") for model in (before, after)]
        agreement = [measured(found.of_model[model], _HALF) for model in (before, after)]
        if None in own or None in agreement:
            continue
        fall = agreement[0].value - agreement[1].value  # type: ignore[union-attr]
        error = math.hypot(agreement[0].stderr, agreement[1].stderr)  # type: ignore[union-attr]
        if own[1] > own[0] and fall > 2 * error:  # type: ignore[operator]
            signs.append(
                f"From {before} to {after} its own scores rise while its agreement with the held-out ranking falls."
            )
    return signs


# --- what they cannot say -------------------------------------------------------------------------------------------


def cannot_say(found: Summary, matches: Matches, judge: str | None) -> list[str]:
    """Say where these numbers end."""
    config = found.config
    said: list[str] = []
    if config and config.engine.kind == "scripted":
        said.append(
            "The scripted engine is a rule with one number, which training raises by construction. What rises here "
            "rises because it was written to: that proves the plumbing, and nothing about language models."
        )
    said += _about_the_judge(found, matches, judge)
    said += _about_the_sizes(found, matches)
    said.append(
        "± is one standard error over prompts; two of them either way are about 95 %. What another seed would change "
        "is not in it, and of this many numbers on a page one in twenty looks striking by chance."
    )
    if config:
        said.append(
            f"One seed ({config.seed}), one campaign. Whether the order of the models survives another seed is not "
            "known until one is run."
        )
        said += _about_the_corpus(config)
    if any(counts.readable.n for counts in found.iterations.values()):
        said += _about_the_reading(config) if config else []
        said.append(
            "Scores that a model gives its own responses are its own opinion. They may rise because the responses got "
            "better or because the judge got kinder; only the held-out pairs and the head-to-heads are outside the "
            "loop."
        )
    said.append(
        "Tie rules decide a good part of judge accuracy: a judge with few distinct scores ties often. The headline "
        "counts ties as wrong, so guessing lies below 0.5 in it; only the number with ties as halves may be held "
        "against 0.5."
    )
    return said


def _about_the_judge(found: Summary, matches: Matches, judge: str | None) -> list[str]:
    if not matches or judge is None:
        return ["There is no head to head, so nothing here says which model answers better."]
    flips = [tally["flip_rate"]["value"] for tally in matches.values() if tally["flip_rate"]["value"] is not None]
    unsure = ""
    if flips:
        share = " to ".join(dict.fromkeys((f"{min(flips):.0%}", f"{max(flips):.0%}")))
        unsure = f" It contradicted itself in {share} of the prompts when the two answers changed places."
    if judge not in found.models:
        return [
            f"The head-to-heads were judged by {judge}, frozen. They show what it prefers; how far that is what people "
            f"prefer is not measured here.{unsure}"
        ]
    who = "the very model that the campaign started from" if judge == BASE else "a model of this campaign"
    accuracy = measured(found.of_model[judge], _HALF)
    worth = ""
    if accuracy:
        verdict = {1: "better than guessing, at least", 0: "not to be told from guessing", -1: "worse than guessing"}
        worth = (
            f" Scoring single responses, it orders {accuracy} of the held-out pairs as they are ranked (ties as "
            f"halves): {verdict[accuracy.beside(0.5)]}."
        )
    return [
        f"The frozen judge of the head-to-heads is {judge}, {who}. It is no bigger than what it judges, and a model "
        "likes what sounds like itself: a win says that the answers moved towards its taste, and very little about "
        f"whether people would prefer them.{worth}{unsure} For a claim about quality, name a stronger judge "
        "(evaluation.judge) or ask people."
    ]


def taught(counts: Mapping[str, Any] | None) -> str:
    """Say what became of the judgments that a model wrote for EFT; nothing where none did."""
    if not counts:
        return ""
    if counts["targets"] == "self_taught":
        return _self_taught(counts)
    said = f"{counts['judge']} wrote {counts['judgments']} judgments of ranked responses for M1 to learn from. "
    if counts["targets"] == "ranked":
        return said + f"{counts['readable']} hold a justification; the score below it is that of the human rank."
    n = counts["groups"]
    share = counts["groups_agreeing"] / n
    agreeing = spell(share, math.sqrt(share * (1 - share) / n), n)
    return said + (
        f"{counts['readable']} can be read. {counts['passes_agreeing']} of {counts['passes']} passes over the "
        f"responses of a prompt agree with people's ranking of them; a share of {agreeing} of the prompts has such a "
        f"pass, which is taught. {counts['over_common']} responses with an over-common score are left out."
    )


def _self_taught(counts: Mapping[str, Any]) -> str:
    said = (
        f"{counts['judge']} made another request of each of {counts['instructions']} instructions of IFT; for a share "
        f"of {_share(counts['pairs'], counts['instructions'])} it and the answer to it can be used, and people's "
        "response to the instruction is taken to be better than that answer. Nobody ranked them. "
    )
    if "judgments" in counts:
        said += (
            f"Asked which is better, it wrote {counts['judgments']} verdicts; a share of "
            f"{_share(counts['readable'], counts['judgments'])} can be read, of these "
            f"{_share(counts['right'], counts['readable'])} are right. {counts['one_sided']} are left out, of the "
            "side that was named rightly more often. "
        )
    return said + f"M1 learns {counts['taught']} comparisons, A and B being right equally often, and no scores."


def _share(part: int, n: int) -> str:
    """Spell a share with its error; verdicts of one pair are taken for independent."""
    share = part / n if n else None
    return spell(share, math.sqrt(share * (1 - share) / n) if share is not None else None, n)


def _about_the_sizes(found: Summary, matches: Matches) -> list[str]:
    said: list[str] = []
    pairs = [int(of[f"{_HALF}_n"]) for of in found.of_model.values() if of.get(f"{_HALF}_n")]
    key = "evaluation/judge_spearman_n"
    groups = [int(of[key]) for of in found.of_model.values() if of.get(key)]
    if pairs and groups:
        said.append(
            f"Judge accuracy rests on {max(groups)} held-out prompts. Their {max(pairs)} pairs are not independent of "
            "one another, which is why the errors come from resampling prompts. Pairs with an unreadable score are "
            "left out, so a model that is read less often is measured on fewer of them."
        )
    played = [tally["win"]["n"] for tally in matches.values()]
    if played and max(played):
        n = max(played)
        said.append(
            f"Head-to-heads rest on {n} evaluation prompts with one answer each: without ties, a share near one half "
            f"has a standard error of {math.sqrt(0.25 / n):.2f}, so hardly anything nearer to even than "
            f"{math.sqrt(1 / n):.2f} can be seen."
        )
    return said


def _about_the_corpus(config: RunConfig) -> list[str]:
    seed = config.seed_data
    if "seed" not in (seed.heldout, seed.evaluation):
        return []
    if seed.heldout == seed.eft == "seed":
        same = "by the same hand as the responses and judgments that M1 learns judging from"
    else:
        same = "by one hand"
    return [
        "What measures comes from the corpus that ships with this project. It was written and ranked "
        f"{same}: one taste. Agreement with it is no proof of agreement with people at large."
    ]


_STEPS = {"min": "lowest", "mean": "mean", "last": "last"}


def _about_the_reading(config: RunConfig) -> list[str]:
    reading = config.judgments
    said: list[str] = []
    if reading.reading != "text":
        said.append(
            f"The loop reads its judge in the form {reading.reading!r}"
            + ("" if reading.justified else ", without a written justification")
            + ", not as text as the paper does. Its readable rate says little: compare “readable as text”."
        )
    if reading.steps:
        said.append(
            f"The judge scores a response step by step, and the response's score is the {_STEPS[reading.steps]} of "
            "its steps'. What M1 learnt of judging are scores of whole responses."
        )
    if reading.judge == "policy":
        said.append(
            "The loop's judge is the model being trained and changes with it: mean scores of two iterations have two "
            "judges."
        )
    return said
