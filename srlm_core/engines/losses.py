"""What a pair costs a policy: losses in nats, one a row, as functions of log-probabilities alone.

A row's log-probabilities are sums over the tokens of its responses, nats; all tensors have shape [B], one entry a row.
A ratio is log p under the policy less log p under the reference.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from srlm_core.config import DpoConfig, ScirConfig


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


def ranking(rewards: Tensor, ranks: Tensor, *, margin: float = 0.0, centre: float = 0.0) -> Tensor:
    """Bradley-Terry loss of one prompt's N ranked responses, both [N], rank 0 the best (arXiv:2203.02155, equation 1).

    The mean over the pairs of unequal rank: a prompt counts once, however many responses it has, or those with many
    would be learnt by heart (section 3.5). Rewards 2, 1, 0 in their order: 0.251150. `margin` is what the better one is
    to lead by, `centre` the weight of (sum of both rewards)^2.
    """
    better, worse = torch.nonzero(ranks[:, None] < ranks[None, :], as_tuple=True)
    lead, both = rewards[better] - rewards[worse], rewards[better] + rewards[worse]
    return (-logsigmoid(lead - margin) + centre * both**2).mean()


def nll(logprob: Tensor, n_tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token, of each response by itself (arXiv:2404.19733, equation 1).

    TRL's `sft` loss pools the tokens of the batch instead, where a long response counts for more than a short one.
    """
    return -logprob / n_tokens.clamp(min=1)  # no tokens: a blank row, of log-probability 0


class Verdicts(NamedTuple):
    """What the policy says when it is asked which of two responses is better: log-odds, nats, of the chosen one."""

    shown_first: Tensor
    """Where chosen is shown first."""
    shown_second: Tensor


class _Coin(NamedTuple):
    """The probability p that chosen is the better response, as log p and log (1 - p): exact near 0 and 1."""

    heads: Tensor
    tails: Tensor

    @classmethod
    def of(cls, *log_odds: Tensor) -> "_Coin":
        """Take the mean of the probabilities, not of the log-odds."""
        of_each = torch.stack(log_odds)
        return cls(*(torch.logsumexp(logsigmoid(sign * of_each), 0) - math.log(len(log_odds)) for sign in (1, -1)))

    @property
    def log_odds(self) -> Tensor:
        return self.heads - self.tails

    @property
    def confidence(self) -> Tensor:
        """|p - 1/2|."""
        return torch.tanh(self.log_odds.abs() / 2) / 2

    @property
    def entropy(self) -> Tensor:
        return -(self.heads.exp() * self.heads + self.tails.exp() * self.tails)

    def held(self) -> "_Coin":
        return _Coin(self.heads.detach(), self.tails.detach())


def scir(
    ratios: LogProbs, verdicts: Verdicts, how: ScirConfig, *, beta: float, warming_up: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """SCIR-style loss of pairs that nobody labelled, and what it saw in them (metric to one number a row).

    Ours throughout: the idea is that of arXiv:2502.08922, whose equations are not known to us. A policy has two
    opinions on whether chosen is the better response, both probabilities: implicit, sigmoid(beta x difference of the
    ratios), and generative, the mean of its verdicts over both orders. Where they are on one side of 1/2, each by
    `delta` at least (while `warming_up`: wherever the verdict is), that side's response is the better one in DPO's
    loss. Beside it, in every row, alpha x (half of both Kullback-Leibler divergences + gamma x half of both entropies).

    Which response stands as chosen makes no difference. No gradient goes through the choice of the better response.
    """
    margin = beta * (ratios.chosen - ratios.rejected)
    implicit, generative = _Coin.of(margin), _Coin.of(*verdicts)
    with torch.no_grad():
        side = generative.log_odds.sign()
        agrees = side * implicit.log_odds.sign() > 0
        sure = (side != 0) & (generative.confidence >= how.delta)
        learnt = sure if warming_up else sure & agrees & (implicit.confidence >= how.delta)
    p = generative.held() if how.stop_gradient == "generative" else generative
    q = implicit.held() if how.stop_gradient == "implicit" else implicit
    # KL(p|q) + KL(q|p) of two coins, without a logarithm of a ratio
    divergence = (p.heads.exp() - q.heads.exp()) * (p.log_odds - q.log_odds) / 2
    entropy = (p.entropy + q.entropy) / 2
    loss = learnt * -logsigmoid(side * margin) + how.alpha * (divergence + how.gamma * entropy)
    seen = {
        "agreement": agrees, "masked": ~learnt, "order_flips": verdicts.shown_first * verdicts.shown_second < 0,
        "generative_confidence": generative.confidence, "implicit_confidence": implicit.confidence,
        "divergence": divergence, "entropy": entropy,
    }  # fmt: skip
    return loss, {name: value.detach().to(loss.dtype) for name, value in seen.items()}


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
    return ("weight", *LOSSES[settings.loss].reads) if settings.labelled else ("weight",)


def of_rows(
    policy: LogProbs, reference: LogProbs, chosen_tokens: Tensor, given: Mapping[str, Tensor], settings: DpoConfig
) -> Tensor:
    """Loss of each row, labelled: weight x (loss of the pair + nll x that of its chosen response).

    `given` holds what `reads` names. A step takes the mean over its rows, not over their weights.
    """
    ratios = LogProbs(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    loss = LOSSES[settings.loss]
    rows = loss.of(ratios, *(given[name] for name in loss.reads), beta=settings.beta)
    if settings.nll:
        rows = rows + settings.nll * nll(policy.chosen, chosen_tokens)
    return given["weight"] * rows
