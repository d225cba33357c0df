"""What a pair costs, as claims on numbers: no model and no trainer."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_core.config import DpoConfig, ScirConfig

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


# ---------------------------------------------------------------------------------------------------------- SCIR-style

log_odds = st.floats(-60, 60)
VERDICTS = (1.2 - 0.2, 0.9 - 0.4)
"""Chosen shown as A against B, and as B against A: sigmoid 0.731059 and 0.622459, mean 0.676759."""


def scir(
    margin: float, verdicts: tuple[float, float] = VERDICTS, *, warming_up: bool = False, **how: Any
) -> tuple[float, dict[str, float], tuple[float, float, float]]:
    """Loss of one pair, what was seen in it, and the gradient by margin and by both verdicts."""
    given = [tensor(value).requires_grad_() for value in (margin, *verdicts)]
    ratios = losses.LogProbs(given[0], tensor(0))
    loss, seen = losses.scir(
        ratios, losses.Verdicts(*given[1:]), ScirConfig(**how), beta=1, warming_up=warming_up
    )  # fmt: skip
    loss.sum().backward()
    slopes = tuple(0.0 if value.grad is None else value.grad.item() for value in given)
    return loss.item(), {name: value.item() for name, value in seen.items()}, slopes


def test_two_rewards_that_agree_cost_dpo_and_what_they_differ_by() -> None:
    """SC-1. implicit sigmoid(0.4) = .598688; L_cons = .013230 + .1 x (.629288 + .673540) / 2 = .078371."""
    policy, reference = both(*POLICY), both(*REFERENCE)
    ratios = losses.LogProbs(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    found, seen = losses.scir(ratios, losses.Verdicts(*map(tensor, VERDICTS)), ScirConfig(), beta=0.1)
    assert found.item() == pytest.approx(0.591387, abs=1e-6)  # -log sigmoid(0.4) + .078371 = .513015 + .078371
    assert seen["divergence"].item() == pytest.approx(0.013230, abs=1e-6)  # half of .013023 + .013436
    assert seen["entropy"].item() == pytest.approx((0.629288 + 0.673540) / 2, abs=1e-6)
    assert (seen["agreement"].item(), seen["masked"].item(), seen["order_flips"].item()) == (1, 0, 0)
    assert seen["generative_confidence"].item() == pytest.approx(0.176759, abs=1e-6)
    assert seen["implicit_confidence"].item() == pytest.approx(0.098688, abs=1e-6)


def test_two_rewards_that_differ_cost_only_that() -> None:
    loss, seen, _ = scir(math.log(0.45 / 0.55))
    assert loss == pytest.approx(0.172401, abs=1e-6)
    assert seen["divergence"] == pytest.approx(0.106530, abs=1e-6)
    assert (seen["agreement"], seen["masked"]) == (0, 1)


def test_a_policy_that_is_its_reference_implies_nothing_and_learns_by_its_verdict_at_first() -> None:
    """SC-2, G-1: p_I = 1/2, whose DPO loss is ln 2."""
    loss, seen, slopes = scir(0.0)
    assert (seen["implicit_confidence"], seen["masked"]) == (0, 1)
    assert seen["divergence"] == pytest.approx(0.065305, abs=1e-6)
    warm, learnt, steeper = scir(0.0, warming_up=True)
    assert warm == pytest.approx(loss + math.log(2))
    assert (learnt["agreement"], learnt["masked"]) == (0, 0)
    assert steeper[0] == pytest.approx(slopes[0] - 0.5)  # of -log sigmoid at 0


@settings(deadline=None)  # a backward pass beside other work
@given(margin=log_odds, first=log_odds, second=log_odds, warm=st.booleans(), delta=st.sampled_from([0, 0.1, 0.3]))
def test_which_of_two_stands_first_makes_no_difference(
    margin: float, first: float, second: float, warm: bool, delta: float
) -> None:
    """SC-3: of the other response either reward says 1 - p; shown first it is where this one was second."""
    loss, seen, slopes = scir(margin, (first, second), warming_up=warm, delta=delta)
    other, same, turned = scir(-margin, (-second, -first), warming_up=warm, delta=delta)
    assert other == pytest.approx(loss)
    assert same == pytest.approx(seen, abs=1e-12)
    assert turned == pytest.approx((-slopes[0], -slopes[2], -slopes[1]), abs=1e-12)


def test_a_pair_that_is_not_learnt_from_still_brings_the_two_together() -> None:
    """SC-4."""
    loss, seen, slopes = scir(-0.5)
    assert seen["masked"] == 1
    assert slopes[0] < 0 < slopes[1]  # down the slope: the log-ratio rises, the verdict falls
    assert slopes[2] > 0
    assert scir(-0.5, alpha=0)[0] == 0
    assert scir(-0.5, alpha=2)[0] == pytest.approx(2 * loss)


def test_delta_asks_both_for_confidence() -> None:
    """p_G - 1/2 = .176759 and p_I - 1/2 = .098688."""
    assert [scir(0.4, delta=delta)[1]["masked"] for delta in (0.09, 0.1, 0.18)] == [0, 1, 1]
    assert [scir(0.4, delta=delta, warming_up=True)[1]["masked"] for delta in (0.09, 0.1, 0.18)] == [0, 0, 1]


def test_a_verdict_that_only_looks_at_the_order_says_nothing() -> None:
    for warm in (False, True):
        _, seen, _ = scir(0.4, (2.0, -2.0), warming_up=warm)
        assert (seen["generative_confidence"], seen["masked"], seen["order_flips"]) == (0, 1, 1)


def test_the_held_reward_has_no_gradient_from_the_other() -> None:
    free, _, slopes = scir(-0.5)
    for held, stays in (("generative", slice(1, 3)), ("implicit", slice(0, 1))):
        loss, _, partial = scir(-0.5, stop_gradient=held)
        assert loss == free
        assert not any(partial[stays])
        assert [s for s, p in zip(slopes, partial, strict=True) if p] == pytest.approx([p for p in partial if p])


@settings(deadline=None)
@given(margin=st.floats(-1e4, 1e4), first=st.floats(-1e4, 1e4), second=st.floats(-1e4, 1e4))
def test_certainty_is_finite(margin: float, first: float, second: float) -> None:
    loss, seen, slopes = scir(margin, (first, second))
    assert all(map(math.isfinite, (loss, *seen.values(), *slopes)))
    assert seen["divergence"] >= -1e-12
    assert -1e-12 <= seen["entropy"] <= math.log(2) + 1e-12


def test_two_that_are_certain_of_opposites_are_that_far_apart() -> None:
    """Half of (1 - 0) x (800 - -800), in float32 as in training."""
    given = [torch.tensor([value], requires_grad=True) for value in (-800.0, 800.0, 800.0)]
    ratios = losses.LogProbs(given[0], torch.zeros(1))
    loss, _ = losses.scir(ratios, losses.Verdicts(*given[1:]), ScirConfig(gamma=0), beta=1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(800)
    assert [value.grad.item() for value in given] == pytest.approx([-0.5, 0.25, 0.25], rel=1e-4)
