"""training: M1 by supervised fine-tuning on IFT + EFT, M_{t+1} by DPO on the pairs of iteration t (section 2.3).

This module lays out the rows; the trainer behind the engine seam does the steps.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from srlm_core import schemas
from srlm_core.engines.protocol import Message
from srlm_core.store import digest

VERSION = 3
_EPSILON = 1e-9
"""0.15 of 20 is 3, whatever the product's last bit says."""


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def ift_examples(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Lay out instruction-response rows for supervised fine-tuning; rows EXAMPLES."""
    return schemas.table(
        (
            {
                "id": digest("ift", row["instruction"], row["response"]),
                "kind": "ift",
                "prompt": [_turn("user", row["instruction"])],
                "completion": [_turn("assistant", row["response"])],
            }
            for row in rows
        ),
        schemas.EXAMPLES,
    )


def eft_examples(
    groups: Iterable[Mapping[str, Any]],
    asked: Mapping[tuple[str, str], Sequence[Message]],
    form: Literal["justified", "score"],
) -> pa.Table:
    """Lay out judged groups as judge prompts with their written judgments; rows EXAMPLES.

    `asked` maps (prompt, response text) to the judge's messages: the same rendering that the loop judges with.
    The form `score` teaches the score line alone, the reading of a judge that does not justify.
    """

    def target(response: Mapping[str, Any]) -> str:
        return response["judgment"] if form == "justified" else f"{schemas.SCORE_LINE}{response['score']}"

    return schemas.table(
        (
            {
                "id": digest("eft", group["prompt"], response["text"]),
                "kind": "eft",
                "prompt": list(asked[group["prompt"], response["text"]]),
                "completion": [_turn("assistant", target(response))],
            }
            for group in groups
            for response in group["responses"]
        ),
        schemas.EXAMPLES,
    )


def rankings(groups: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Lay out ranked groups for a reward model, a row a prompt; rows RANKINGS."""
    return schemas.table(
        (
            {
                "id": digest("ranking", group["prompt"]),
                "prompt": [_turn("user", group["prompt"])],
                "responses": [response["text"] for response in group["responses"]],
                "ranks": [response["rank"] for response in group["responses"]],
            }
            for group in groups
        ),
        schemas.RANKINGS,
    )


def queries(prompts: pa.Table) -> pa.Table:
    """Lay out prompts for a policy gradient; rows QUERIES."""
    return schemas.conform(pa.table({"id": prompts["prompt_id"], "prompt": prompts["messages"]}), schemas.QUERIES)


def preferences(pairs: pa.Table, ask: Callable[..., Sequence[Message]] | None = None) -> pa.Table:
    """Lay out pairs for DPO, with pair ids that lead back to both responses; rows PREFERENCES.

    A pair's label, weight and scores go along: how far the loss trusts it. `ask` renders the question which of two
    responses to a prompt is better (keywords prompt, first, second), for a loss that puts it to the model.
    """
    columns = {
        "id": pairs["pair_id"], "prompt": pairs["messages"],
        "chosen": _assistant_turns(pairs["chosen"]), "rejected": _assistant_turns(pairs["rejected"]),
        **{name: pairs[name] for name in ("chosen_score", "rejected_score", "label", "weight")},
        "asked_ab": _asked(pairs, ask, "chosen", "rejected"), "asked_ba": _asked(pairs, ask, "rejected", "chosen"),
    }  # fmt: skip
    return schemas.conform(pa.table(columns), schemas.PREFERENCES)


def _asked(pairs: pa.Table, ask: Callable[..., Sequence[Message]] | None, first: str, second: str) -> pa.Array:
    if ask is None:
        return pa.nulls(pairs.num_rows, schemas.MESSAGES)
    shown = zip(*(pairs[name].to_pylist() for name in ("messages", first, second)), strict=True)
    asked = [list(ask(prompt=schemas.conversation(messages), first=a, second=b)) for messages, a, b in shown]
    return pa.array(asked, schemas.MESSAGES)


def _assistant_turns(texts: pa.ChunkedArray) -> pa.Array:
    columns = [pa.repeat("assistant", len(texts)), texts.combine_chunks()]
    said = pa.StructArray.from_arrays(columns, fields=list(schemas.MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), said)


def draw(pair_ids: Iterable[str], share: float, *where: Any) -> frozenset[str]:
    """Draw at most `share` of the pairs by the hash of their ids and of `where`; their order does not matter."""
    ids = sorted(pair_ids, key=lambda pair_id: digest("replay", *where, pair_id))
    return frozenset(ids[: math.floor(share * len(ids) + _EPSILON)])


def hold_out(rows: pa.Table, share: float) -> tuple[pa.Table, pa.Table]:
    """Split rows into (training, held out) by the hash of what the prompt asks: no prompt is on both sides."""
    if not share:
        return rows, rows.slice(0, 0)
    asked = (schemas.prompt_text(messages.as_py()) for messages in rows["prompt"])
    held = [int(digest("held out", text), 16) / 16**16 < share for text in asked]
    return rows.filter(pa.array([not h for h in held], pa.bool_())), rows.filter(pa.array(held, pa.bool_()))
