"""What a pair costs a policy: losses in nats, one a row, as functions of log-probabilities alone.

A row's log-probabilities are sums over the tokens of its responses, nats; all tensors have shape [B], one entry a row.
A ratio is log p under the policy less log p under the reference.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from srlm_core.config import DpoConfig


class LogProbs(NamedTuple):
    """Log-probabilities of both responses of each row, nats."""

    chosen: Tensor
    rejected: Tensor


def sigmoid(ratios: LogProbs, label: Tensor, *, beta: float) -> Tensor:
    """DPO with a soft label (conservative DPO; arXiv:2410.12735, soft-labelled DPO loss).

    `label` is the probability, in [0, 1], that chosen is the better response; 1 is plain DPO (arXiv:2305.18290,
    equation 7). By the margin beta x (difference of the ratios) the gradient is sigmoid(margin) - label. Not TRL's
    `robust`, which divides by 2 x label - 1 and so has no value at 1/2.
    """
    margin = beta * (ratios.chosen - ratios.rejected)
    return -label * logsigmoid(margin) - (1 - label) * logsigmoid(-margin)


def sppo(ratios: LogProbs, chosen_score: Tensor, rejected_score: Tensor, *, beta: float) -> Tensor:
    """SPPO: each ratio goes by itself to (score - 1/2) / beta (arXiv:2405.00675, equation 4.7).

    A score is the probability, in [0, 1], that the response beats one of the policy's.
    """
    chosen = ratios.chosen - (chosen_score - 0.5) / beta
    rejected = ratios.rejected - (rejected_score - 0.5) / beta
    return (chosen**2 + rejected**2) / 2


def nll(logprob: Tensor, n_tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token, of each response by itself (arXiv:2404.19733, equation 1).

    TRL's `sft` loss pools the tokens of the batch instead, where a long response counts for more than a short one.
    """
    return -logprob / n_tokens


class Loss(NamedTuple):
    """A loss of pairs, and the numbers of a row that it asks for besides beta, in its order."""

    of: Callable[..., Tensor]
    reads: tuple[str, ...]


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, ("label",)),
    "sppo": Loss(sppo, ("chosen_score", "rejected_score")),
}


def reads(settings: DpoConfig) -> tuple[str, ...]:
    """Name the numbers that must stand beside each pair."""
    return ("weight", *LOSSES[settings.loss].reads)


def of_rows(
    policy: LogProbs, reference: LogProbs, chosen_tokens: Tensor, given: Mapping[str, Tensor], settings: DpoConfig
) -> Tensor:
    """Loss of each row: weight x (loss of the pair + nll x that of its chosen response).

    `given` holds what `reads` names. A step takes the mean over its rows, not over their weights.
    """
    ratios = LogProbs(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    loss = LOSSES[settings.loss]
    rows = loss.of(ratios, *(given[name] for name in loss.reads), beta=settings.beta)
    if settings.nll:
        rows = rows + settings.nll * nll(policy.chosen, chosen_tokens)
    return given["weight"] * rows
