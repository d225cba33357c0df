"""The nucleus (top-p), exactly, without sorting the vocabulary.

On a processor the sort of every row costs more than the forward pass of a small model. The nucleus of a confident row
lies within its best 256 tokens; a logsumexp says whether it does, and only the other rows are sorted.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor import BatchUpdate

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ImportError:  # the transformers engine uses the functions alone
    LogitsProcessor = object  # type: ignore[assignment,misc]

BEST = 256
"""Tokens looked at before a row is sorted."""
EXTRA = "srlm_top_p"
"""Where a vLLM request carries its top_p; its own top_p is then 1."""


class Nucleus(NamedTuple):
    """Kept tokens of each row, best first; shape (rows, tokens). Those past a row's nucleus have probability 0."""

    tokens: torch.Tensor
    probabilities: torch.Tensor
    """Under the whole distribution: a row sums to at least its top_p."""


def nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> Nucleus:
    """Find each row's smallest set of best tokens whose probability reaches top_p; the best token is always in it.

    `logits` is float32 of shape (rows, vocabulary), `top_p` of shape (rows,), in (0, 1]; 1 keeps all.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(min(BEST, logits.shape[-1]), dim=-1)
    probabilities = (best.values - norm).exp()
    enough = probabilities.sum(-1) >= top_p
    tokens = best.indices
    if not bool(enough.all()):
        rest = (~enough).nonzero().squeeze(-1)
        in_order = logits[rest].sort(dim=-1, descending=True)
        widest = torch.zeros(logits.shape, dtype=probabilities.dtype, device=logits.device)
        order = torch.zeros(logits.shape, dtype=tokens.dtype, device=logits.device)
        widest[:, : tokens.shape[-1]], order[:, : tokens.shape[-1]] = probabilities, tokens
        widest[rest], order[rest] = (in_order.values - norm[rest]).exp(), in_order.indices
        probabilities, tokens = widest, order
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    return Nucleus(tokens, probabilities.masked_fill_(outside, 0.0))


def keep_nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return logits that are -inf outside each row's nucleus; shapes as in `nucleus`."""
    found = nucleus(logits, top_p)
    kept = torch.full_like(logits, -torch.inf)
    # A place past the nucleus may name any token, 0 too, so the kept values go in by maximum
    values = logits.gather(-1, found.tokens).masked_fill_(found.probabilities == 0, -torch.inf)
    return kept.scatter_reduce_(-1, found.tokens, values, "amax")


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

        process_dict_updates(self._top_p, batch_update, lambda params, prompt, output: (params.extra_args or {}).get(EXTRA))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits with each row's nucleus alone."""
        if not self._top_p:
            return logits
        top_p = torch.ones(len(logits))
        top_p[list(self._top_p)] = torch.tensor(list(self._top_p.values()))
        some = (top_p < 1).nonzero().squeeze(-1)
        if len(some) == len(logits):
            return keep_nucleus(logits, top_p)
        logits[some] = keep_nucleus(logits[some], top_p[some])
        return logits
