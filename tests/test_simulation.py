"""The world with a judge of known flaws: does each part do what its name says?"""

import math
from dataclasses import replace

import numpy as np
import pytest

from srlm_core import simulation as sim
from srlm_core.simulation import ARMS, FLAWS, LENGTH, MANNER, MERIT, World

SMALL = replace(World(), others=64, drift_cost=0.0)
CLEAR = sim.Judge(lasting=0.0, fresh=0.0)


def campaigns(arm, judge, seeds=8, world=SMALL):
    return [list(sim.campaign(world, ARMS[arm], judge, seed))[-1] for seed in range(seeds)]


def mean_and_error(rows, measure):
    values = np.array([row[measure] for row in rows])
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def turn(judge, *responses, world=SMALL, t=1):
    """One prompt; each response as (merit, length, manner). Nothing is left to chance."""
    n, k = len(responses), world.judgments
    draws = sim.Draws(
        np.zeros((1, n, 3 + world.others), np.float32), np.zeros(1), np.zeros((1, n)), np.zeros((1, n, k)),
        *np.zeros((4, 1, n)), np.zeros((1, k, k)),
    )  # fmt: skip
    draws.features[..., :3] = responses
    return sim.respond(world, sim.begin(world, judge, 0), draws, t)


# --- the world ------------------------------------------------------------------------------------------------------


def test_an_oracle_improves_quality_and_nothing_else():
    rows = campaigns("oracle", CLEAR)
    # best of five is 1.163 sd above the mean, worst as far below: 4 trainings * 0.25 * 2.326 sd * 0.7 points = 1.63
    assert mean_and_error(rows, "quality")[0] - World.start == pytest.approx(1.63, abs=0.06)
    for measure, none in (("length", 1.0), ("manner", 0.0)):
        value, error = mean_and_error(rows, measure)
        assert abs(value - none) < 4 * error
    assert all(row["judge_error"] == 0 for row in rows)


def test_a_random_judge_moves_nothing_but_what_drift_costs():
    rows = campaigns("random", CLEAR, seeds=16)
    for measure, none in (("quality", World.start), ("length", 1.0), ("manner", 0.0), ("judge_error", 0.5)):
        value, error = mean_and_error(rows, measure)
        assert abs(value - none) < 4 * error, measure
    dear = campaigns("random", CLEAR, world=replace(SMALL, drift_cost=0.2))
    # each training adds 2 * 64 features * step^2 / 64 prompts to the squared distance: 4 * 0.125, half of it nats
    assert mean_and_error(dear, "drift")[0] == pytest.approx(0.25, abs=0.04)
    assert all(row["quality"] == pytest.approx(2.5 + 0.7 * 0 - 0.2 * row["drift"], abs=0.3) for row in dear)


def test_a_judge_of_length_alone_inflates_length_and_learns_nothing():
    blind = replace(SMALL, merit=1e-9)
    rows = campaigns("self_rewarding", replace(CLEAR, length=1.0), world=blind)
    assert min(row["length"] for row in rows) > 1.5
    assert mean_and_error(rows, "quality")[0] == pytest.approx(World.start, abs=1e-6)


def test_training_moves_the_mean_by_the_step_towards_chosen_less_rejected():
    one = replace(SMALL, prompts=1)
    asked = turn(CLEAR, (2.0, 1.0, 0.0), (-1.0, 0.5, 3.0), (0.0, 0.0, 0.0), world=one)
    state, paired, label = sim.train(ARMS["oracle"], asked)
    np.testing.assert_allclose(state.mean[:3], 0.25 * np.array([3.0, 0.5, -3.0]))
    assert (paired, label) == (1.0, 1.0)
    half, _, label = sim.train(ARMS["self_rewarding_half"]._replace(score=sim.by_truth), asked)
    np.testing.assert_allclose(half.mean, state.mean / 2)  # C = 3/4: 2 C - 1
    unsure, _, _ = sim.train(ARMS["oracle"]._replace(label=lambda turn: 0.5), asked)
    assert not unsure.mean.any()


def test_a_label_may_be_each_prompts_own():
    asked = turn(CLEAR, (2.0, 1.0, 0.0), (-1.0, 0.5, 3.0))
    draws = asked.draws._replace(features=np.repeat(asked.draws.features, 2, 0))
    both = asked._replace(
        world=replace(SMALL, prompts=2), draws=draws, named=asked.named.repeat(2, 0), quality=asked.quality.repeat(2, 0)
    )
    state, _, label = sim.train(ARMS["oracle"]._replace(label=lambda turn: np.array([1.0, 0.25])), both)
    np.testing.assert_allclose(state.mean[:3], 0.25 * (1.0 - 0.5) / 2 * np.array([3.0, 0.5, -3.0]))
    assert label == 0.625


def test_a_tie_gives_no_pair():
    state, paired, _ = sim.train(ARMS["self_rewarding"], turn(CLEAR, (-0.1, 1.0, 0.0), (-0.2, 0.0, 0.0)))
    assert paired == 0  # 2.43 and 2.36: both are written as 2 points
    assert not state.mean.any()


def test_length_control_takes_the_shorter_of_the_good_and_the_longer_of_the_bad():
    asked = turn(CLEAR, (3.1, 2.0, 0.0), (2.0, -1.0, 0.0), (-2.0, 0.5, 0.0), (-3.1, 0.0, 0.0))
    plain, held = (sim.train(ARMS[name], asked)[0].mean for name in ("self_rewarding", "self_rewarding_rho"))
    assert plain[LENGTH] > 0 > held[LENGTH]


def test_same_seed_same_numbers_whatever_else_is_run():
    some = [sim.Case("noise", 1.4, arms=("cream",)), sim.Case("leniency", 2, arms=("meta_rewarding",))]
    rows = sim.simulate(some, 2)
    assert rows == sim.simulate(some, 2)
    assert [row for row in rows if row["arm"] == "cream"] == sim.simulate(some[:1], 2)
    assert rows[0] | {"seed": 1} != rows[5 * 2]


def test_another_method_is_one_function():
    shortest = sim.Arm("the shortest is best", lambda turn: -turn.named[..., LENGTH])
    assert list(sim.campaign(SMALL, shortest, CLEAR, 0))[-1]["length"] < 0.6


def test_without_a_flaw_strength_nought_is_one_judge_for_all_flaws():
    judges = {sim.judge_with(World(), flaw, 0.0) for flaw in FLAWS if flaw != "noise"}
    assert judges == {sim.judge_with(World(), "noise", World.noise)}
    assert sim.judge_with(World(), "noise", 0.0) == CLEAR


# --- each flaw, on a case made by hand ------------------------------------------------------------------------------


def test_leniency_shifts_and_the_ceiling_compresses_the_top():
    asked = (2.0, 0.0, 0.0), (0.0, 0.0, 0.0), (-2.0, 0.0, 0.0)  # 3.9, 2.5 and 1.1 points
    assert sim.by_judge(turn(CLEAR, *asked))[0].tolist() == [4, 2, 1]
    assert sim.by_judge(turn(replace(CLEAR, leniency=3.0), *asked))[0].tolist() == [5, 5, 4]


@pytest.mark.parametrize(("flaw", "column"), [("length", LENGTH), ("self_preference", MANNER)])
def test_a_taste_pays_points_for_its_feature_alone(flaw, column):
    plain, more = np.zeros(3), np.zeros(3)
    more[column] = 1.0
    asked = turn(replace(CLEAR, **{flaw: 1.2}), plain, more, -more)
    np.testing.assert_allclose(sim.misreading(asked)[0], [0, 1.2, -1.2])
    np.testing.assert_allclose(asked.quality[0], 2.5)


def test_self_preference_pays_for_own_responses_against_foreign_ones():
    state = sim.begin(SMALL, replace(CLEAR, self_preference=1.4), 0)
    draws = sim.draw(0, "held out", 128, 2, 5, 64)
    asked = sim.held_out(SMALL, state, draws, 1)
    own_first = sim.by_judge(asked)[:, 0] > sim.by_judge(asked)[:, 1]
    better = asked.quality[:, 0] > asked.quality[:, 1]
    assert own_first[1::2].mean() > 0.7  # the second is foreign
    assert better[1::2].mean() < 0.6
    assert abs(own_first[::2].mean() - better[::2].mean()) < 0.15


def test_noise_is_of_its_strength_and_its_lasting_share_is_common_to_all_judgments():
    judge = sim.judge_with(World(), "noise", 2.0)
    assert (judge.noise, judge.lasting) == pytest.approx((2.0, math.sqrt(2)))
    draws = sim.draw(0, "x", 2000, 2, 5, 0)
    world = replace(World(), others=0)
    asked = sim.respond(world, sim.begin(world, judge, 0), draws, 1)
    assert sim.misreading(asked).std() == pytest.approx(math.sqrt(2), rel=0.05)
    assert asked.state.judge.fresh == pytest.approx(math.sqrt(2))


def test_position_bias_lets_the_first_of_equals_win():
    points = np.array([[3.0, 3.0, 4.0, 3.0, 3.0]])
    fair, biased = (
        sim._outcomes(turn(replace(CLEAR, position=p), (0.7, 0, 0)), points, np.array([0])) for p in (0.0, 2.0)
    )
    assert fair[0, 0, 1] == fair[0, 1, 0] == 0
    assert biased[0, 0, 1] == biased[0, 1, 0] == 1
    assert not np.diagonal(biased[0]).any()
    # the truth is 2.99, so 3 is nearer than 4, in either order; a lead of 2 points drowns that
    assert (fair[0, 0, 2], fair[0, 2, 0]) == (1, -1)
    assert (biased[0, 0, 2], biased[0, 2, 0]) == (1, 1)


# --- the judge's training, and CREAM's reward -----------------------------------------------------------------------


def meta(judge, world, seed=0):
    draws = sim.draw(seed, "meta", 400, 5, 5, 0)
    return sim.meta_judged(sim.respond(replace(world, others=0), sim.begin(world, judge, seed), draws, 1))


def test_a_meta_judge_that_sees_the_truth_lowers_noise_leniency_and_tastes():
    judge = replace(sim.judge_with(World(), "noise", 1.4), leniency=1.0, length=0.7, self_preference=0.7)
    better = meta(judge, replace(World(), insight=1.0, others=0))
    assert better.fresh < judge.fresh
    assert better.leniency < judge.leniency
    assert better.length < judge.length
    assert better.self_preference < judge.self_preference
    assert (better.lasting, better.position) == (judge.lasting, judge.position)


def test_one_that_shares_all_errors_lowers_noise_alone():
    judge = replace(sim.judge_with(World(), "noise", 1.4), leniency=0.5)
    alike = [meta(judge, replace(World(), insight=0.0, others=0), seed) for seed in range(6)]
    moved = [one.leniency - judge.leniency for one in alike]
    assert all(one.fresh < judge.fresh for one in alike)
    assert abs(np.mean(moved)) < 0.06


def test_a_judge_without_noise_has_nothing_to_compare():
    judge = replace(CLEAR, leniency=1.0)
    assert meta(judge, replace(World(), others=0)) == judge


def test_the_policys_reward_is_the_way_it_was_trained():
    world = replace(World(), others=0)
    judge = replace(CLEAR, length=0.7)
    asked = turn(judge, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, -1.0, 0.0), world=world)
    now, before = sim.rewards(asked)
    np.testing.assert_allclose(now[0] - now[0, 2], [1.0, 1.0, 0.0, -2.0])  # merit 1, length 0.7 / 0.7, manner 0
    np.testing.assert_allclose(before[0], [0.3, 0, 0, -0.3], atol=1e-6)  # M_0 ranks by its likelihood


def test_two_models_trained_alike_agree_and_against_one_another_do_not():
    asked = turn(
        CLEAR, (1.0, 0.2, 0.0), (0.5, 0.1, 0.0), (0.0, 0.0, 0.0), (-1.0, -0.3, 0.0), world=replace(World(), others=0)
    )
    way = asked.state.base
    for before, expected in ((way * -0.1, 1.0), (way * 3, 0.0)):
        state = asked.state._replace(mean=np.zeros(3), before=before)
        assert sim.consistency(asked._replace(state=state)) == pytest.approx(expected)


def test_the_error_of_a_judge_counts_a_tie_one_half():
    quality = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    scores = np.array([[3.0, 2.0], [3.0, 2.0], [2.0, 2.0], [4.0, 1.0]])
    assert sim.judge_error(scores, quality) == (0 + 1 + 0.5 + 0) / 4


def test_quality_is_merit_less_the_cost_of_drift():
    mean = np.zeros(3 + 8)
    mean[MERIT], mean[3:] = 1.0, 0.5
    assert sim.drift(mean) == pytest.approx(1.0)  # 8 * 0.25 / 2
    assert sim.quality_of(mean, World()) == pytest.approx(2.5 + 0.7 - 0.2)
