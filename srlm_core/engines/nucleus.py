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

    rows: torch.Tensor | slice
    tokens: torch.Tensor
    """Shape (rows, tokens), best first."""
    probabilities: torch.Tensor
    """Of the same shape, under the whole distribution; 0 outside the nucleus. A row sums to at least its top_p."""


def nuclei(logits: torch.Tensor, top_p: torch.Tensor) -> Iterator[Nuclei]:
    """Find each row's smallest set of best tokens whose probability reaches top_p; the best token is always in it.

    `logits` is float32 of shape (rows, vocabulary), `top_p` of shape (rows,), in (0, 1]; 1 keeps all tokens.
    """
    # softmax is one pass where logsumexp is four
    best, shares = logits.topk(min(BEST, logits.shape[-1]), dim=-1), logits.softmax(-1)
    probabilities = shares.gather(-1, best.indices)
    covered = (probabilities.sum(-1) >= top_p) | (logits.shape[-1] <= BEST)
    if bool(covered.all()):
        yield Nuclei(slice(None), best.indices, _cut(probabilities, top_p))
        return
    kept, rest = covered.nonzero()[:, 0], (~covered).nonzero()[:, 0]
    in_order = shares[rest].sort(dim=-1, descending=True)
    yield Nuclei(kept, best.indices[kept], _cut(probabilities[kept], top_p[kept]))
    yield Nuclei(rest, in_order.indices, _cut(in_order.values, top_p[rest]))


def _cut(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    return probabilities.masked_fill(outside, 0.0)


def keep_nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set the logits outside each row's nucleus to -inf, in place; shapes as in `nuclei`."""
    found = [(nucleus, logits[nucleus.rows].gather(-1, nucleus.tokens)) for nucleus in nuclei(logits, top_p)]
    logits.fill_(-torch.inf)
    for (rows, tokens, probabilities), values in found:
        values = values.masked_fill_(probabilities == 0, -torch.inf)
        if isinstance(rows, slice):
            logits.scatter_(-1, tokens, values)
        else:
            logits[rows[:, None], tokens] = values
    return logits


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
