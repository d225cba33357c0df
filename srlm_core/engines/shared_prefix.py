"""Rows that begin alike compute their beginning once: exact, and most of an EFT row is the rubric.

A decoder's state at a token depends on the tokens before it alone. So the rows of a batch that share their first
tokens can share those tokens' keys and values, forward and backward; what differs is computed row by row, without
the padding of longer rows elsewhere in the batch.
"""

from collections import defaultdict
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

_HEAD = 48
"""Rows are looked at together where this many first tokens agree; shorter beginnings are not worth a second pass."""


def share_prefixes(model: Any) -> bool:
    """Make a causal LM's decoder compute what rows of a batch have in common once; say whether it can.

    The caller sees the same hidden states (rounding aside); padding positions hold zeros.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder.config, "layer_types", None) or ["full_attention"]
    if set(layers) != {"full_attention"} or getattr(decoder.config, "sliding_window", None):
        return False  # a state or a window instead of all keys and values: nothing that rows could share
    plain = decoder.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if input_ids is None or attention_mask is None or others.get("past_key_values") is not None:
            return plain(input_ids=input_ids, attention_mask=attention_mask, **others)
        lengths = attention_mask.sum(1)
        padded_left = bool((attention_mask[:, 0] == 0).any())
        groups = [] if padded_left else alike(input_ids, lengths)
        if not any(len(rows) > 1 for rows in groups):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **others)
        others["use_cache"] = False
        hidden: list[Any] = [None] * len(input_ids)
        for rows in _with_singles_together(groups):
            width = int(lengths[rows].max())
            ids, mask = input_ids[rows, :width], attention_mask[rows, :width]
            group = _grouped(decoder, plain, ids, mask, int(lengths[rows].min()), others)
            padding = (0, 0, 0, input_ids.shape[1] - width)
            for row, state in zip(rows, torch.nn.functional.pad(group, padding), strict=True):
                hidden[row] = state
        states: Any = torch.stack(hidden)
        return BaseModelOutputWithPast(last_hidden_state=states)

    decoder.forward = forward
    return True


def alike(input_ids: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    """Group the rows [B, L] that agree in their first tokens; a row shorter than that stands alone."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, (ids, length) in enumerate(zip(input_ids.tolist(), lengths.tolist(), strict=True)):
        groups[tuple(ids[:_HEAD]) if length > _HEAD else row].append(row)
    return list(groups.values())


def common_prefix(input_ids: torch.Tensor, shortest: int) -> int:
    """Count the leading tokens that all rows share, leaving at least one token of each row."""
    same = (input_ids == input_ids[:1]).all(0)[: shortest - 1]
    return int(same.long().cumprod(0).sum())


def _with_singles_together(groups: list[list[int]]) -> list[list[int]]:
    singles = [rows[0] for rows in groups if len(rows) == 1]
    return [rows for rows in groups if len(rows) > 1] + ([singles] if singles else [])


def _grouped(decoder: Any, plain: Any, ids: Any, mask: Any, shortest: int, others: dict[str, Any]) -> torch.Tensor:
    """Hidden states [B, L, H] of rows that share a prefix, or, where they share too little, computed as they are."""
    shared = common_prefix(ids, shortest) if len(ids) > 1 else 0
    if shared < _HEAD:
        return plain(input_ids=ids, attention_mask=mask, **others).last_hidden_state
    cache = DynamicCache(config=decoder.config)
    caching = {**others, "use_cache": True, "past_key_values": cache}
    prefix = plain(input_ids=ids[:1, :shared], attention_mask=mask[:1, :shared], **caching).last_hidden_state
    cache.batch_repeat_interleave(len(ids))
    rest = plain(input_ids=ids[:, shared:], attention_mask=mask, **caching).last_hidden_state
    return torch.cat([prefix.expand(len(ids), -1, -1), rest], dim=1)
