"""Batches without padding, in which rows that begin alike compute their beginning once: exact, forward and backward.

A decoder's state at a token depends on the tokens before it alone. So a batch is a tree: a rubric that all rows begin
with, a request that some share, what each says at the end; a pair's prompt with its two answers. Each stretch of the
tree is computed once, all of them side by side in one row, and only attention knows who comes after whom.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

_WORTH = 16
"""Fewest shared tokens that make a stretch of their own: it costs one more call of attention a layer."""
_NAME = "srlm_packed"


class Stretch(NamedTuple):
    """A run of tokens that some rows share."""

    ids: list[int]
    above: tuple[int, ...]
    """Numbers of the stretches that come before it, first to last."""
    start: int
    """Position of its first token in its rows."""
    rows: tuple[int, ...]


def tree(rows: Sequence[Sequence[int]]) -> list[Stretch]:
    """Cut rows of token ids into stretches, each before those that follow it; every token of a row is in one."""
    stretches: list[Stretch] = []
    filled = [i for i, row in enumerate(rows) if row]
    todo: list[tuple[list[int], int, tuple[int, ...]]] = [(filled, 0, ())] if filled else []
    while todo:
        together, start, above = todo.pop()
        end = _common(rows, together, start)
        if end - start >= _WORTH or all(len(rows[row]) == end for row in together):
            stretches.append(Stretch(list(rows[together[0]][start:end]), above, start, tuple(together)))
            start, above = end, (*above, len(stretches) - 1)
        branches: defaultdict[int, list[int]] = defaultdict(list)
        for row in together:
            if len(rows[row]) > start:
                branches[rows[row][end] if len(rows[row]) > end else -1].append(row)
        todo += [(branch, start, above) for branch in reversed(branches.values())]
    return stretches


def _common(rows: Sequence[Sequence[int]], together: list[int], start: int) -> int:
    """Return where the rows first differ, or where the shortest ends."""
    first, end = rows[together[0]], min(len(rows[row]) for row in together)
    for row in together[1:]:
        if rows[row][start:end] != first[start:end]:
            end = next(place for place in range(start, end) if rows[row][place] != first[place])
    return end


def pack(model: Any) -> bool:
    """Make a causal LM's decoder compute batches that way; say whether it can.

    The caller sees hidden states [B, L, H] as before (rounding aside); what they hold at padding means nothing.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder.config, "layer_types", None) or ["full_attention"]
    windowed = set(layers) != {"full_attention"} or getattr(decoder.config, "sliding_window", None)
    if windowed or not getattr(decoder, "_supports_attention_backend", False):
        return False  # a state or a window instead of all keys and values, or attention of its own: nothing to share
    plain = decoder.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if input_ids is None or attention_mask is None or others.get("past_key_values") is not None:
            return plain(input_ids=input_ids, attention_mask=attention_mask, **others)
        if bool((attention_mask[:, 0] == 0).any()):  # padded on the left
            return plain(input_ids=input_ids, attention_mask=attention_mask, **others)
        lengths = attention_mask.sum(1).tolist()
        rows = [ids[:length] for ids, length in zip(input_ids.tolist(), lengths, strict=True)]
        stretches = tree(rows)
        batch = _Batch.of(stretches, input_ids)
        given = {**others, "use_cache": False, "position_ids": batch.positions, "stretches": batch}
        attention, decoder.config._attn_implementation = decoder.config._attn_implementation, _NAME
        try:
            states = plain(input_ids=batch.ids, attention_mask=None, **given).last_hidden_state[0]
        finally:
            decoder.config._attn_implementation = attention
        found: Any = torch.nn.functional.embedding(batch.places, states)
        return BaseModelOutputWithPast(last_hidden_state=found)

    decoder.forward = forward
    return True


class _Batch(NamedTuple):
    """A tree as tensors."""

    ids: torch.Tensor
    """Shape [1, T]: the stretches one behind the other."""
    positions: torch.Tensor
    """Shape [1, T]."""
    places: torch.Tensor
    """Shape [B, L]: where each token of the batch is computed; 0 at padding."""
    sizes: list[int]
    above: list[tuple[int, ...]]
    masks: list[torch.Tensor | None]
    """Of each stretch that follows others, [own, before + own]: all before, and its own up to each token."""

    @classmethod
    def of(cls, stretches: Sequence[Stretch], input_ids: torch.Tensor) -> "_Batch":
        places = torch.zeros_like(input_ids)
        masks: list[torch.Tensor | None] = []
        offset = 0
        for stretch in stretches:
            size = len(stretch.ids)
            here = torch.arange(offset, offset + size, device=places.device)
            places[list(stretch.rows), stretch.start : stretch.start + size] = here
            seen = torch.ones(size, stretch.start + size, dtype=torch.bool, device=places.device)
            masks.append(seen.tril(stretch.start) if stretch.above else None)
            offset += size
        flat = [token for stretch in stretches for token in stretch.ids]
        positions = [stretch.start + i for stretch in stretches for i in range(len(stretch.ids))]
        return cls(
            torch.tensor([flat], device=places.device), torch.tensor([positions], device=places.device), places,
            [len(stretch.ids) for stretch in stretches], [stretch.above for stretch in stretches], masks,
        )  # fmt: skip


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, stretches: _Batch,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend from each stretch to itself and what comes before it; query [1, heads, T, d], returns [1, T, heads, d]."""
    group = query.shape[1] // key.shape[1]
    queries = query.split(stretches.sizes, dim=2)
    keys, values = (each.repeat_interleave(group, dim=1).split(stretches.sizes, dim=2) for each in (key, value))
    attended = []
    for number, (own, above, mask) in enumerate(zip(queries, stretches.above, stretches.masks, strict=True)):
        seen = (*above, number)
        k, v = (torch.cat([each[i] for i in seen], dim=2) if above else each[number] for each in (keys, values))
        attended.append(
            torch.nn.functional.scaled_dot_product_attention(
                own, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
