"""alpaca_eval: AlpacaEval 2 (Dubois et al., arXiv:2404.04475): one answer each against a baseline's.

A judge says with one letter which of two answers is better; the verdict is the probability of the letter. Which one
is shown first depends on the question alone. The template is ours.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from srlm_core import judgments, schemas, winrate
from srlm_core.engines.protocol import Request, TokenScores
from srlm_core.judgments import Verdict
from srlm_core.rates import Rate, rate
from srlm_core.suites.record import BASELINE, Asked, Item, Judge, Suite, Tables, by_item, judgment, rows_of, too_long

_LETTERS = ("m", "M")


def read(where: str) -> list[Item]:
    """Read the baseline's outputs: rows with instruction and output, as AlpacaEval publishes them."""
    rows = {row["instruction"]: row for row in rows_of(where, ("instruction", "output"))}
    return [Item(asked, (asked,), row.get("dataset") or "", (row["output"],), None, row) for asked, row in rows.items()]


def judge(items: Sequence[Item], answers: pa.Table, by: Judge) -> Tables:
    """Compare each answer with the baseline's; verdict = probability that the model's is better, in [0, 1]."""
    rubric = judgments.load_rubric("alpaca_eval", justified=None)
    shown: dict[str, Asked] = {}
    for item, (row, *_) in by_item(items, answers):
        own, other = row["response"], item.references[0]
        own_first = int(item.prompt_id[:8], 16) % 2 == 0
        pair = {"m": own, "M": other} if own_first else {"m": other, "M": own}
        messages = rubric.ask(prompt=item.turns[0], first=pair["m"], second=pair["M"])
        first = row["response_id"] if own_first else BASELINE
        shown[row["response_id"]] = Asked(item, 0, row["response_id"], messages, first)
    requests = (Request(key, one.messages) for key, one in shown.items())
    told = {scores.request_id: scores for scores in by.engine.token_scores(requests, _LETTERS)}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for key, one in shown.items():
        if told[key].logprobs is None and told[key].missing == "too_long":
            drops.append(too_long(one, by))
            continue
        verdict, text, ended = _weighed(told[key], own_first=one.first != BASELINE)
        row = {"reading": "expected", "text": text, "finish_reason": ended}
        rows.append(judgment(one, by, verdict, form="pairwise", rubric=rubric.identity, **row))
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


def _weighed(scores: TokenScores, *, own_first: bool) -> tuple[Verdict, str, str]:
    """Return the probability that the model's answer is better, both letters' spelled, and how the judge ended."""
    if scores.logprobs is None:
        return Verdict(None, judgments.why_not_whole(scores.missing)), "", scores.missing
    p_first = judgments.normalise(scores.logprobs)[0]
    return Verdict(p_first if own_first else 1 - p_first, None), f"m:{p_first:.3f} M:{1 - p_first:.3f}", "stop"


def measure(items: Sequence[Item], answers: pa.Table, verdicts: pa.Table | None) -> dict[str, Any]:
    """Return the plain and the length-controlled win rate, shares of 1, as `srlm winrate` makes them."""
    answered = by_item(items, answers)
    lengths = {item.prompt_id: (len(row["response"]), len(item.references[0])) for item, (row, *_) in answered}
    told: dict[str, Any] = {"chars": rate([float(own) for own, _ in lengths.values()])._asdict()}
    if verdicts is None:
        return told
    said = [
        winrate.Verdict("", row["prompt_id"], row["verdict"], float(own - other), float(own))
        for row in verdicts.to_pylist()
        if row["verdict"] is not None
        for own, other in [lengths[row["prompt_id"]]]
    ]
    told["readable_rate"] = rate([float(row["verdict"] is not None) for row in verdicts.to_pylist()])._asdict()
    if not said:
        return told | {"win_rate": rate([])._asdict(), "length_controlled": rate([])._asdict()}
    won = winrate.win_rates(said)[""]
    return told | {
        "win_rate": _share(won.win_rate, won.win_rate_stderr, won.n),
        "length_controlled": _share(won.length_controlled_win_rate, won.length_controlled_win_rate_stderr, won.n),
    }


def _share(percent: float | None, stderr: float | None, n: int) -> dict[str, Any]:
    if percent is None:
        return rate([])._asdict()
    return Rate(percent / 100, None if stderr is None else stderr / 100, n)._asdict()


def files(items: Sequence[Item], answers: pa.Table, verdicts: pa.Table | None, model: str) -> dict[str, Any]:
    """Lay out answers and verdicts as the official tool does.

    It takes the answers by `alpaca_eval --model_outputs model_outputs.json`, and `srlm winrate` the verdicts.
    """
    outputs = [
        {"dataset": item.category, "instruction": item.turns[0], "output": row["response"], "generator": model}
        for item, (row, *_) in by_item(items, answers)
    ]
    if verdicts is None:
        return {"model_outputs.json": outputs}
    won = dict(zip(verdicts["prompt_id"].to_pylist(), verdicts["verdict"].to_pylist(), strict=True))
    annotations = [
        {
            "instruction": item.turns[0], "output_1": item.references[0], "output_2": row["response"],
            "generator_1": item.published.get("generator") or BASELINE, "generator_2": model,
            "dataset": item.category, "preference": 1 + won[item.prompt_id],
        }
        for item, (row, *_) in by_item(items, answers)
        if won.get(item.prompt_id) is not None
    ]  # fmt: skip
    return {"model_outputs.json": outputs, "annotations.json": annotations}


SUITE = Suite("alpaca_eval", read, measure, judge, ("alpaca_eval",), files)
