"""What a pair costs, as claims on numbers: no model and no trainer."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core.config import DpoConfig

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")

from srlm_core.engines import losses  # noqa: E402

POLICY, REFERENCE = (-40.0, -52.0), (-42.0, -50.0)
"""Chosen and rejected, nats: ratios of 2 and -2, at beta 0.1 a margin of 0.1 x (2 - -2) = 0.4."""

ratio = st.floats(-60, 60)
share = st.floats(0, 1)


def tensor(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.float64)


def both(chosen: float, rejected: float) -> losses.LogProbs:
    return losses.LogProbs(tensor(chosen), tensor(rejected))


def loss_of(label: float = 1, weight: float = 1, scores: tuple[float, float] = (1, 0), n_tokens: int = 20,
            policy: tuple[float, float] = POLICY, **settings: Any) -> float:  # fmt: skip
    numbers = {"label": label, "weight": weight, "chosen_score": scores[0], "rejected_score": scores[1]}
    columns = {name: tensor(value) for name, value in numbers.items()}
    return losses.of_rows(both(*policy), both(*REFERENCE), tensor(n_tokens), columns, DpoConfig(**settings)).item()


def slope(label: float, margin: float) -> float:
    """Gradient of the soft-labelled loss by the margin, with beta 1."""
    chosen = tensor(margin).requires_grad_()
    losses.sigmoid(losses.LogProbs(chosen, tensor(0)), tensor(label), beta=1).sum().backward()
    return chosen.grad.item()


# ------------------------------------------------------------------------------------------------------- worked numbers


def test_a_certain_pair_costs_what_dpo_says() -> None:
    assert loss_of(policy=REFERENCE) == pytest.approx(math.log(2))
    assert loss_of() == pytest.approx(0.513015, abs=1e-6)  # log(1 + exp(-0.4))
    assert loss_of(label=0) == pytest.approx(0.913015, abs=1e-6)  # the same pair, labels swapped: 0.4 more


@pytest.mark.parametrize(
    ("label", "loss", "gradient"),
    [
        (5 / 6, 0.579682, -0.234646),  # 5/6 x 0.513015 + 1/6 x 0.913015; sigmoid(0.4) - 5/6
        (1 / 2, 0.713015, 0.098688),  # 1/2 x 0.513015 + 1/2 x 0.913015; sigmoid(0.4) - 1/2
    ],
)
def test_a_soft_label_costs_what_cream_says(label: float, loss: float, gradient: float) -> None:
    assert loss_of(label=label) == pytest.approx(loss, abs=1e-6)
    assert slope(label, 0.4) == pytest.approx(gradient, abs=1e-6)
    assert slope(label, 0.0) == pytest.approx(0.5 - label)
    assert loss_of(label=label, policy=REFERENCE) == pytest.approx(math.log(2)), "whatever the label"


def test_a_soft_label_is_not_trls_robust_loss() -> None:
    """That one is (5/6 x 0.513015 - 1/6 x 0.913015) / (1 - 2/6) = 0.413015, and divides by zero at 1/2."""
    assert pytest.approx(0.413015) == (5 / 6 * 0.513015 - 1 / 6 * 0.913015) / (2 / 3)
    assert abs(loss_of(label=5 / 6) - 0.413015) > 0.1


def test_a_soft_label_is_best_met_at_its_own_odds() -> None:
    """ln(5/6 : 1/6) = ln 5 = 1.609438, where the loss is the label's entropy; a certain pair has no such end."""
    assert slope(5 / 6, math.log(5)) == pytest.approx(0, abs=1e-6)
    assert losses.sigmoid(both(math.log(5), 0), tensor(5 / 6), beta=1).item() == pytest.approx(0.450561, abs=1e-6)
    assert slope(1, math.log(5)) < -0.1


@pytest.mark.parametrize(
    ("scores", "loss"),
    [
        ((1, 0), 248004),  # half of (2 - 500)^2 + (-2 + 500)^2
        ((0.75, 0.25), 61504),  # half of (2 - 250)^2 + (-2 + 250)^2
        ((0.5, 0.5), 4),  # half of 2^2 + (-2)^2: even responses stay where the reference has them
    ],
)
def test_sppo_costs_what_its_paper_says(scores: tuple[float, float], loss: float) -> None:
    assert loss_of(loss="sppo", beta=1e-3, scores=scores) == pytest.approx(loss)


def test_the_likelihood_term_is_per_token_of_the_chosen_response() -> None:
    assert loss_of(nll=1) == pytest.approx(0.513015 + 40 / 20, abs=1e-6)
    assert loss_of(nll=0.5, weight=3) == pytest.approx(3 * (0.513015 + 0.5 * 40 / 20), abs=1e-6)
    assert loss_of(loss="sppo", beta=1e-3, nll=1) == pytest.approx(248004 + 40 / 20)


def test_the_likelihood_term_weighs_responses_alike_and_not_their_tokens() -> None:
    """IR-1: 40 nats over 20 tokens and 5 over 5 are (2 + 1) / 2 = 1.5; the tokens pooled would be 45 / 25 = 1.8."""
    assert losses.nll(tensor(-40, -5), tensor(20, 5)).mean().item() == 1.5


# ---------------------------------------------------------------------------------------------------------- properties


@given(chosen=ratio, rejected=ratio, label=share)
def test_a_swapped_pair_with_the_label_turned_costs_the_same(chosen: float, rejected: float, label: float) -> None:
    one = losses.sigmoid(both(chosen, rejected), tensor(label), beta=0.1)
    other = losses.sigmoid(both(rejected, chosen), tensor(1 - label), beta=0.1)
    assert one.item() == pytest.approx(other.item())


@given(chosen=ratio, rejected=ratio)
def test_a_certain_label_is_plain_dpo(chosen: float, rejected: float) -> None:
    plain = math.log1p(math.exp(-0.1 * (chosen - rejected)))
    assert losses.sigmoid(both(chosen, rejected), tensor(1), beta=0.1).item() == pytest.approx(plain)


@given(chosen=ratio, rejected=ratio, label=share)
def test_the_slope_is_the_policys_belief_less_the_label(chosen: float, rejected: float, label: float) -> None:
    margin = chosen - rejected
    belief = 1 / (1 + math.exp(-margin))
    assert slope(label, margin) == pytest.approx(belief - label, abs=1e-9)


@given(chosen=ratio, rejected=ratio, scores=st.tuples(share, share))
def test_sppo_takes_a_swapped_pair_with_its_scores(chosen: float, rejected: float, scores: tuple[float, float]) -> None:
    one = losses.sppo(both(chosen, rejected), tensor(scores[0]), tensor(scores[1]), beta=0.1)
    other = losses.sppo(both(rejected, chosen), tensor(scores[1]), tensor(scores[0]), beta=0.1)
    assert one.item() == pytest.approx(other.item())
    assert one.item() >= 0


@given(weight=st.floats(0, 10), label=share, nll=st.floats(0, 2))
def test_a_weight_scales_the_whole_row(weight: float, label: float, nll: float) -> None:
    assert loss_of(label=label, nll=nll, weight=weight) == pytest.approx(weight * loss_of(label=label, nll=nll))
