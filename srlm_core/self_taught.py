"""self_taught: judge data without people's judgments (Self-Taught Evaluators, arXiv:2408.02666).

A model writes a request that is like an instruction of IFT but asks for something else, and answers that: as a response
to the instruction its answer is worse than people's, so the order is known. What it says when asked which of the two
is better, in both orders, is taught where it is right.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import comparisons, judgments, responses, schemas
from srlm_core.comparisons import Match
from srlm_core.config import SamplingConfig
from srlm_core.contamination import Watch, words
from srlm_core.engines.protocol import Engine, Request
from srlm_core.store import digest, seed_for

VERSION = 1
Tables = tuple[pa.Table, pa.Table]
Row = Mapping[str, Any]
Aside = tuple[str, str]
"""An instruction, and why nothing is taught of it."""


def rubric() -> judgments.Rubric:
    """Load what the model is asked for another request with."""
    return judgments.load_rubric("modify", justified=None)


# --- a response that is worse by the way it was made ----------------------------------------------------------------


def modify(ift: Sequence[Row], engine: Engine, how: SamplingConfig, *, model: str, seed: int) -> Tables:
    """Have another request written for each instruction; rows RESPONSES, with the instruction's prompt id; DROPS."""
    asked = [{"prompt_id": _id(row), "messages": list(rubric().ask(prompt=row["instruction"]))} for row in ift]
    return responses.respond(pa.Table.from_pylist(asked), engine, how, n=1, iteration=0, model=model, seed=seed)


def _id(row: Row) -> str:
    return digest("modified", row["instruction"])


def usable(ift: Sequence[Row], modified: pa.Table, watch: Watch) -> tuple[pa.Table, list[Aside]]:
    """Take the requests that ask for something else, as rows PROMPTS, and say of the others why not.

    Nothing near to what measures gets in: the answer to it would be trained on.
    """
    written = {row["prompt_id"]: row for row in modified.to_pylist()}
    rows: list[dict[str, object]] = []
    aside: list[Aside] = []
    for row in ift:
        found = written.get(_id(row))
        why = _why_not(found) or _why_no_other(row, found["response"], watch) if found else "prompt_too_long"
        if why or not found:
            aside.append((row["instruction"], f"another request: {why}"))
            continue
        messages = [{"role": "user", "content": found["response"].strip()}]
        rows.append({"prompt_id": _id(row), "iteration": 0, "messages": messages, "source": "modified",
                     "generator": found["model"]})  # fmt: skip
    return schemas.table(rows, schemas.PROMPTS), aside


def _why_not(written: Row) -> str | None:
    if written["finish_reason"] != "stop":
        return judgments.why_not_whole(written["finish_reason"])
    return None if words(written["response"]) else "empty"


def _why_no_other(row: Row, text: str, watch: Watch) -> str | None:
    if words(text) == words(row["instruction"]):
        return "the same as the instruction"
    return "copy_of_evaluation" if watch.copy_in(text) else None


def matches(ift: Sequence[Row], asked: pa.Table, answered: pa.Table) -> tuple[list[Match], list[Aside]]:
    """Match people's response to each instruction, as `a`, with the answer to the other request, `b`."""
    wanted = set(asked["prompt_id"].to_pylist())
    said = {row["prompt_id"]: row for row in answered.to_pylist()}
    played: list[Match] = []
    aside: list[Aside] = []
    for row in (row for row in ift if _id(row) in wanted):
        prompt, found = row["instruction"], said.get(_id(row))
        why = _why_not(found) or _why_no_worse(row, found["response"]) if found else "prompt_too_long"
        if why or not found:
            aside.append((prompt, f"answer to another request: {why}"))
        else:
            chosen = digest("ift", prompt, row["response"])
            played.append(Match(_id(row), prompt, chosen, row["response"], found["response_id"], found["response"]))
    return played, aside


def _why_no_worse(row: Row, text: str) -> str | None:
    return "the same as people's response" if words(text) == words(row["response"]) else None


# --- which of the two is better -------------------------------------------------------------------------------------


def judge(
    played: Sequence[Match], engine: Engine, how: SamplingConfig, *, passes: int, model: str, seed: int
) -> Tables:
    """Ask `passes` times which response of each match is better, in both orders; rows JUDGMENTS, and DROPS.

    The question is the one that comparisons are asked with; verdict = 1 where the one shown first is taken, 0 where the
    second is, null where the text names both or neither.
    """
    asked = comparisons.pairwise(justified=True)
    shown = {f"{order}/{number}": (match, order) for number, match in enumerate(played) for order in comparisons.PLACES}
    requests = [
        Request(
            name, messages=comparisons.ask(asked, *place), sampling=responses.sampling(how), n=passes,
            seed=seed_for(seed, "self_taught", place[0].a_id, place[0].b_id, place[1], model),
        )
        for name, place in shown.items()
    ]  # fmt: skip
    told = {(done.request_id, done.index): done for done in engine.generate(requests)}
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for request, index in itertools.product(requests, range(passes)):
        match, order = shown[request.id]
        done = told.get((request.id, index))
        if done is None or done.finish_reason == "too_long":
            if index == 0:
                row = {"id": digest(order, match.a_id, match.b_id), "stage": "judgments"}
                drops.append({**row, "reason": "judge_prompt_too_long", "iteration": 0, "detail": None})
            continue
        verdict = comparisons.parse_better(done.text, done.finish_reason)
        row = comparisons.row(match, order, model, asked.identity, 0)
        said = {"index": index, "reading": "text", "text": done.text, "verdict": verdict.value,
                "unreadable_reason": verdict.unreadable_reason, "finish_reason": done.finish_reason,
                "seed": request.seed + index}  # fmt: skip
        rows.append({**row, **said, "judgment_id": digest(row["judgment_id"], index, done.text)})
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


class Trace(NamedTuple):
    """What is taught of one match in one order."""

    match: Match
    order: str
    text: str

    @property
    def side(self) -> str:
        """The place of the better response: A or B."""
        return schemas.SHOWN[self.order != "ab"]


def bare(played: Sequence[Match]) -> list[Trace]:
    """Teach the verdict line alone, of all matches in both orders: nobody has to write what is known."""
    return [
        Trace(match, order, f"{schemas.BETTER_LINE}{Trace(match, order, '').side}")
        for match in played
        for order in comparisons.PLACES
    ]


def right(played: Sequence[Match], rows: pa.Table) -> tuple[list[Trace], Counter[str]]:
    """Take of each match and order the first pass that is right, and count what was said.

    Counted: judgments, readable, right, each reason why one was not read, and orders_right, which are taken.
    """
    of = {(match.a_id, match.b_id): match for match in played}
    counts = Counter({"judgments": rows.num_rows, "readable": 0, "right": 0, "orders_right": 0})
    taken: dict[tuple[str, str, str], Trace] = {}
    for row in sorted(rows.to_pylist(), key=lambda row: row["index"]):
        if row["verdict"] is None:
            counts[f"unreadable: {row['unreadable_reason']}"] += 1
            continue
        counts["readable"] += 1
        a_first = row["first"] == row["target_id"]
        if (row["verdict"] == 1) == a_first:
            counts["right"] += 1
            order = comparisons.PLACES[not a_first]
            text = comparisons.explanation_in(row["text"]) + f"{schemas.BETTER_LINE}{schemas.SHOWN[not a_first]}"
            key = row["target_id"], row["other_id"], order
            taken.setdefault(key, Trace(of[key[:2]], order, text))
    counts["orders_right"] = len(taken)
    places = ((match, order) for match in played for order in comparisons.PLACES)
    found = (taken.get((match.a_id, match.b_id, order)) for match, order in places)
    return [trace for trace in found if trace], counts


def balanced(traces: Sequence[Trace]) -> list[Trace]:
    """Leave out, by hash, what one side has more of: A is right as often as B, and always saying one wins nothing."""
    of_side: dict[str, list[Trace]] = {side: [] for side in schemas.SHOWN}
    for trace in sorted(traces, key=lambda trace: digest("balanced", trace.match.a_id, trace.match.b_id, trace.order)):
        of_side[trace.side].append(trace)
    fewest = min(map(len, of_side.values()))
    kept = {trace for of in of_side.values() for trace in of[:fewest]}
    return [trace for trace in traces if trace in kept]


def examples(traces: Sequence[Trace], *, justified: bool) -> pa.Table:
    """Lay out what is taught, asked as comparisons are asked; rows EXAMPLES."""
    return schemas.table(_examples(traces, comparisons.pairwise(justified=justified)), schemas.EXAMPLES)


def _examples(traces: Sequence[Trace], asked: judgments.Rubric) -> Iterator[dict[str, object]]:
    for match, order, text in traces:
        yield {
            "id": digest("eft", match.prompt, match.a_id, match.b_id, order),
            "kind": "eft",
            "prompt": list(comparisons.ask(asked, match, order)),
            "completion": [{"role": "assistant", "content": text}],
        }
