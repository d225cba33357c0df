"""The nucleus (top-p), exactly, without sorting the vocabulary, and without noise for every token of it.

On a processor the sort of every row costs more than the forward pass of a small model. The nucleus of nearly every row
lies within its best 64 tokens; the sum of their probabilities says whether it does, and only the other rows are looked
at more widely. A token is drawn from the nucleus by one number a row. The number depends on the sample's seed and the
position alone, and not on what else is in the batch or on which engine draws.

Only an engine's child imports the module: it pays for torch at the top.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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

LOOKED_AT = (64, 1024)
"""Best tokens looked at, step by step, before a row is sorted. Of 1,011 rows of the 135M model at T = 0.7 and
p = 0.9, 2 % have a larger nucleus than the first and none than the second."""


class Nuclei(NamedTuple):
    """The nuclei of some rows."""

    rows: torch.Tensor
    tokens: torch.Tensor
    """Shape (rows, tokens), best first."""
    probabilities: torch.Tensor
    """Of the same shape, under the whole distribution; 0 outside the nucleus. A row sums to at least its top_p."""


def nuclei(probabilities: torch.Tensor, top_p: torch.Tensor) -> Iterator[Nuclei]:
    """Find each row's smallest set of best tokens whose probability reaches top_p; the best token is always in it.

    `probabilities` is of shape (rows, vocabulary), `top_p` of shape (rows,), in (0, 1]; 1 keeps all tokens.
    """
    vocabulary = probabilities.shape[-1]
    rows = torch.arange(len(probabilities), device=probabilities.device)
    for tokens in (*LOOKED_AT, vocabulary):
        asked = top_p[rows]
        best = (probabilities if len(rows) == len(probabilities) else probabilities[rows]).topk(min(tokens, vocabulary))
        covered = ((best.values.sum(-1) >= asked) & (asked < 1)) | (tokens >= vocabulary)
        if bool(covered.any()):
            yield Nuclei(rows[covered], best.indices[covered], _cut(best.values[covered], asked[covered]))
        rows = rows[~covered]
        if not len(rows):
            return


def _cut(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    return probabilities.masked_fill(outside, 0.0)


def draw(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from its nucleus, by the number in [0, 1) that the row brings; returns shape (rows,).

    `logits` is float32 of shape (rows, vocabulary) and used up: afterwards it holds the probabilities. The others are
    of shape (rows,); a temperature is above 0.
    """
    # In place: a fresh buffer of this size costs more in page faults than the arithmetic
    probabilities = torch.softmax(logits.div_(temperature[:, None]), -1, out=logits)
    drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for rows, tokens, inside in nuclei(probabilities, top_p):
        below = inside.cumsum(-1)
        # Rounding may put the mark at the very end, past the last token that has a probability
        last = (inside > 0).sum(-1, keepdim=True) - 1
        chosen = torch.searchsorted(below, uniform[rows, None] * below[:, -1:], right=True).minimum(last)
        drawn[rows] = tokens.gather(-1, chosen).squeeze(-1)
    return drawn


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) by which the sample of this seed draws its token at this position."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


class Drawing(NamedTuple):
    """What the processor remembers of a row."""

    temperature: float
    top_p: float
    seed: int
    said: Sequence[int]
    """The tokens drawn so far; vLLM appends to it."""


class NucleusProcessor(LogitsProcessor):
    """Draws for vLLM: of a row that asks for a nucleus it leaves the drawn token as the best one.

    vLLM takes such a request for greedy, and so spends neither a sort nor noise over the vocabulary on it.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Drawing] = {}

    def is_argmax_invariant(self) -> bool:
        """Say no: what is best after it is what it drew."""
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow requests through the rows of the batch."""
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        process_dict_updates(self._rows, batch_update, lambda params, prompt, said: _drawing(params.extra_args, said))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits with the drawn token of each row at infinity."""
        if not self._rows:
            return logits
        rows = torch.tensor(sorted(self._rows))
        asked = [self._rows[row] for row in rows.tolist()]
        temperature = torch.tensor([row.temperature for row in asked])
        top_p = torch.tensor([row.top_p for row in asked])
        numbers = torch.tensor([uniform(row.seed, len(row.said)) for row in asked])
        drawn = draw(logits if len(rows) == len(logits) else logits[rows], temperature, top_p, numbers)
        logits[rows, drawn] = torch.inf
        return logits


def _drawing(extra: Mapping[str, Any] | None, said: Sequence[int]) -> Drawing | None:
    return Drawing(**extra[EXTRA], said=said) if extra and EXTRA in extra else None
