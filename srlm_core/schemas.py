"""One Arrow schema per dataset, and `conform`, which checks a table where it enters a file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

SCORE_LINE = "Score: "
"""How the line begins that ends a judgment, and holds its score."""
BETTER_LINE, SHOWN = "Better: ", ("A", "B")
"""How the answer begins when two responses are compared, and what follows: the one shown first, or the second."""

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)]))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


PROMPTS = pa.schema(
    [
        _required("prompt_id", pa.string()),
        _required("iteration", pa.int32()),
        _required("messages", MESSAGES),
        _required("source", pa.string()),
        _required("generator", pa.string()),
    ]
)
RESPONSES = pa.schema(
    [
        _required("response_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("iteration", pa.int32()),
        _required("index", pa.int32()),
        _required("response", pa.string()),
        pa.field("n_tokens", pa.int32()),
        _required("finish_reason", pa.string()),
        _required("source", pa.string()),
        _required("model", pa.string()),
        _required("seed", pa.int64()),
    ]
)
"""n_tokens: null for a response that no model of the campaign wrote, such as a reference."""
JUDGMENTS = pa.schema(
    [
        _required("judgment_id", pa.string()),
        _required("target_id", pa.string()),
        pa.field("other_id", pa.string()),
        pa.field("first", pa.string()),
        _required("prompt_id", pa.string()),
        _required("iteration", pa.int32()),
        _required("index", pa.int32()),
        _required("form", pa.string()),
        _required("reading", pa.string()),
        _required("judge", pa.string()),
        _required("rubric", pa.string()),
        _required("text", pa.string()),
        pa.field("verdict", pa.float64()),
        pa.field("unreadable_reason", pa.string()),
        _required("finish_reason", pa.string()),
        _required("seed", pa.int64()),
    ]
)
LOGPROBS = pa.schema(
    [
        _required("response_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("iteration", pa.int32()),
        _required("model", pa.string()),
        pa.field("logprob", pa.float64()),
        _required("n_tokens", pa.int32()),
    ]
)
"""What one model makes of responses: sum over tokens, nats, the one that ends the turn included."""
REWARDS = pa.schema(
    [
        _required("response_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("iteration", pa.int32()),
        _required("model", pa.string()),
        pa.field("reward", pa.float64()),
    ]
)
"""What a reward model gives responses: numbers without a unit, null where there is none."""
PAIRS = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("iteration", pa.int32()),
        _required("kind", pa.string()),
        _required("messages", MESSAGES),
        _required("chosen", pa.string()),
        _required("rejected", pa.string()),
        _required("chosen_id", pa.string()),
        _required("rejected_id", pa.string()),
        pa.field("chosen_score", pa.float64()),
        pa.field("rejected_score", pa.float64()),
        pa.field("label", pa.float64()),
        _required("weight", pa.float64()),
    ]
)
DROPS = pa.schema(
    [
        _required("id", pa.string()),
        _required("stage", pa.string()),
        _required("reason", pa.string()),
        _required("iteration", pa.int32()),
        pa.field("detail", pa.string()),
    ]
)
EXAMPLES = pa.schema(
    [
        _required("id", pa.string()),
        _required("kind", pa.string()),
        _required("prompt", MESSAGES),
        _required("completion", MESSAGES),
    ]
)
"""Rows of supervised fine-tuning: IFT and EFT."""
PREFERENCES = pa.schema(
    [
        _required("id", pa.string()),
        _required("prompt", MESSAGES),
        _required("chosen", MESSAGES),
        _required("rejected", MESSAGES),
        pa.field("chosen_score", pa.float64()),
        pa.field("rejected_score", pa.float64()),
        pa.field("label", pa.float64()),
        _required("weight", pa.float64()),
        pa.field("asked_ab", MESSAGES),
        pa.field("asked_ba", MESSAGES),
    ]
)
"""Rows of DPO, as the trainer reads them. `label` is the probability that chosen is the better response, 1 = certain,
null where nobody said; `weight` scales a row's loss; `asked_ab` asks which of the two is better, chosen shown first,
`asked_ba` with rejected shown first, null unless the loss asks. `training.dpo.loss` says which of these count."""
RANKINGS = pa.schema(
    [
        _required("id", pa.string()),
        _required("prompt", MESSAGES),
        _required("responses", pa.list_(pa.string())),
        _required("ranks", pa.list_(pa.int32())),
    ]
)
"""Rows of a reward model's training: a prompt, texts, and the rank of each, 0 = best, equal ones equally good."""
QUERIES = pa.schema([_required("id", pa.string()), _required("prompt", MESSAGES)])
"""Rows of a policy gradient: what is answered while it trains."""

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": PROMPTS,
    "responses": RESPONSES,
    "judgments": JUDGMENTS,
    "pairs": PAIRS,
    "drops": DROPS,
}


def table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Build a table from rows. Every row has exactly the schema's columns; raises ValueError otherwise.

    Arrow by itself fills a misspelt key with nulls and drops the extra one.
    """
    rows = list(rows)
    names = set(schema.names)
    for row in rows:
        if row.keys() != names:
            wrong = sorted(names.symmetric_difference(row.keys()))
            raise ValueError(
                f"expected the columns {sorted(names)}, got a row that differs in {wrong}: {str(row)[:200]}"
            )
    return conform(pa.Table.from_pylist(rows, schema=schema), schema)


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast to the schema, check nulls, keys and ranges. Conforming twice changes nothing.

    Raises ValueError on missing or unknown columns, nulls where none may be, a key that occurs twice,
    a negative verdict (a sentinel, not a judgment), or a pair of a response with itself.
    """
    if set(rows.schema.names) != set(schema.names):
        raise ValueError(f"expected the columns {schema.names}, got {rows.schema.names}")
    rows = rows.select(schema.names).cast(schema)
    for field in schema:
        if not field.nullable and rows[field.name].null_count:
            raise ValueError(f"{field.name}: expected no null, got {rows[field.name].null_count}")
    key = schema.names[0]
    if key.endswith("_id") and len(set(rows[key].to_pylist())) != rows.num_rows:
        raise ValueError(f"{key}: expected each once, got {rows.num_rows - len(set(rows[key].to_pylist()))} twice")
    if "verdict" in schema.names:
        for verdict, reason in zip(rows["verdict"].to_pylist(), rows["unreadable_reason"].to_pylist(), strict=True):
            if (verdict is None) == (reason is None):
                raise ValueError(f"expected a verdict or a reason why there is none, got {verdict!r} and {reason!r}")
            if verdict is not None and not verdict >= 0:
                raise ValueError(f"verdict: expected a number from 0 up, or null, got {verdict}")
    if "chosen_id" in schema.names and any(
        a == b for a, b in zip(rows["chosen_id"].to_pylist(), rows["rejected_id"].to_pylist(), strict=True)
    ):
        raise ValueError("expected a pair of two different responses, got one paired with itself")
    return rows


def prompt_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the last user turn: what a short conversation asks."""
    return messages[-1]["content"]


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation for the judge: a single turn as it is, several with their speakers."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}] {message['content']}" for message in messages)
