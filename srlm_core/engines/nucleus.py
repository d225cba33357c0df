"""The nucleus (top-p), exactly, without sorting the vocabulary.

On a processor the sort of every row costs more than the forward pass of a small model. The nucleus of most rows lies
within their best 256 tokens; a logsumexp says whether it does, and only the other rows are sorted.

Only an engine's child imports the module: it pays for torch at the top.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from srlm_core.engines.vllm import EXTRA

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
else:
    try:
        from vllm.v1.sample.logits_processor import LogitsProcessor
    except ImportError:  # the transformers engine uses the functions alone
        LogitsProcessor = object

BEST = 256
"""Tokens looked at before a row is sorted."""


class Nuclei(NamedTuple):
    """The nuclei of some rows."""

    rows: torch.Tensor
    tokens: torch.Tensor
    """Shape (rows, tokens), best first."""
    probabilities: torch.Tensor
    """Of the same shape, under the whole distribution; 0 outside the nucleus. A row sums to at least its top_p."""


def nuclei(logits: torch.Tensor, top_p: torch.Tensor) -> Iterator[Nuclei]:
    """Find each row's smallest set of best tokens whose probability reaches top_p; the best token is always in it.

    `logits` is float32 of shape (rows, vocabulary), `top_p` of shape (rows,), in (0, 1]; 1 keeps all tokens.
    """
    rows, norm = torch.arange(len(logits), device=logits.device), logits.logsumexp(-1, keepdim=True)
    best = logits.topk(min(BEST, logits.shape[-1]), dim=-1)
    probabilities = (best.values - norm).exp()
    covered = (probabilities.sum(-1) >= top_p) | (logits.shape[-1] <= BEST)
    if bool(covered.all()):
        yield _cut(rows, best.indices, probabilities, top_p)
        return
    rest = rows[~covered]
    in_order = logits[rest].sort(dim=-1, descending=True)
    yield _cut(rows[covered], best.indices[covered], probabilities[covered], top_p[covered])
    yield _cut(rest, in_order.indices, (in_order.values - norm[rest]).exp(), top_p[rest])


def _cut(rows: torch.Tensor, tokens: torch.Tensor, probabilities: torch.Tensor, top_p: torch.Tensor) -> Nuclei:
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    return Nuclei(rows, tokens, probabilities.masked_fill_(outside, 0.0))


def keep_nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return logits that are -inf outside each row's nucleus; shapes as in `nuclei`."""
    kept = torch.full_like(logits, -torch.inf)
    for rows, tokens, probabilities in nuclei(logits, top_p):
        values = logits[rows].gather(-1, tokens).masked_fill_(probabilities == 0, -torch.inf)
        kept[rows] = kept[rows].scatter_(-1, tokens, values)
    return kept


def draw(logits: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from its nucleus, by the number in [0, 1) that the row brings; returns shape (rows,)."""
    drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for rows, tokens, probabilities in nuclei(logits, top_p):
        below = probabilities.cumsum(-1)
        # Rounding may put the mark at the very end, past the last token that has a probability
        last = (probabilities > 0).sum(-1, keepdim=True) - 1
        chosen = torch.searchsorted(below, uniform[rows, None] * below[:, -1:], right=True).minimum(last)
        drawn[rows] = tokens.gather(-1, chosen).squeeze(-1)
    return drawn


class NucleusProcessor(LogitsProcessor):
    """Gives vLLM's CPU sampler the nucleus: it runs after the temperature, in the place of vLLM's own top-p."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._top_p: dict[int, float] = {}

    def is_argmax_invariant(self) -> bool:
        """Leave greedy requests alone: the best token is in every nucleus."""
        return True

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow requests through the rows of the batch."""
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        process_dict_updates(
            self._top_p, batch_update, lambda params, prompt, output: (params.extra_args or {}).get(EXTRA)
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits with each row's nucleus alone."""
        if not self._top_p:
            return logits
        rows = torch.tensor(sorted(self._top_p))
        top_p = torch.tensor([self._top_p[row] for row in rows.tolist()])
        if len(rows) == len(logits):
            return keep_nucleus(logits, top_p)
        logits[rows] = keep_nucleus(logits[rows], top_p)
        return logits
