"""Log-ratios as rewards, and how far two rankings agree, by numbers worked by hand."""

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tables import prompts, responses

from srlm_core import logprobs
from srlm_core.engines.protocol import LogProb

NOW = (3.0, 1.0, 2.0, 0.5)


class Scores:
    """An engine that finds a response as probable as it is short, and some too long."""

    def logprobs(self, rows):
        return (
            LogProb(row.id, None if "long" in row.response else -float(len(row.response)), 2, False) for row in rows
        )


def c(correlation):
    return (correlation + 1) / 2


@pytest.mark.parametrize(
    ("before", "kendall", "spearman", "top"),
    [((2.5, 1.2, 0.9, 0.1), 0.833333, 0.9, 1), ((2.5, 0.8, 0.2, 1.2), 0.5, 0.6, 0)],
)
def test_consistency_of_the_worked_examples(before, kendall, spearman, top):
    for by, expected in (("kendall", kendall), ("spearman", spearman), ("top_order", top)):
        assert c(logprobs.correlation(NOW, before, by)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("now", "before", "same"), [((2, 4, 1, 3), (3, 4, 1, 2), 1), ((1, 4, 3, 2), (1, 3, 4, 2), -1)])
def test_best_and_worst_are_looked_up_by_rank_not_by_place(now, before, same):
    assert logprobs.correlation(now, before, "top_order") == same


@pytest.mark.parametrize("before", [(2, 1, 0), (1, 2, 0)])
def test_what_is_tied_is_tied_and_not_broken_by_place(before):
    assert logprobs.correlation((1, 1, 0), before, "kendall") == pytest.approx(2 / math.sqrt(6))


@pytest.mark.parametrize("by", ["kendall", "spearman", "top_order"])
@pytest.mark.parametrize("values", [((1, 1, 1), (1, 2, 3)), ((1, 2, 3), (0, 0, 0)), ((1,), (2,)), ((), ())])
def test_a_constant_ranking_or_one_of_length_one_is_undefined(by, values):
    assert logprobs.correlation(*values, by) is None


scores = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=6)


@given(scores, st.sampled_from(["kendall", "spearman"]), st.randoms(use_true_random=False))
def test_rows_in_another_order_agree_as_far(drawn, by, rng):
    shuffled = list(drawn)
    rng.shuffle(shuffled)
    values = [logprobs.correlation(*zip(*rows, strict=True), by) for rows in (drawn, shuffled)]
    assert values[0] == (None if values[1] is None else pytest.approx(values[1], abs=1e-9))


@given(scores)
def test_kendall_counts_pairs_of_responses(drawn):
    now, before = zip(*drawn, strict=True)
    assume(len(set(now)) == len(now) and len(set(before)) == len(before))
    signs = [(a - c) * (b - d) > 0 for (a, b), (c, d) in itertools.combinations(drawn, 2)]
    expected = (2 * sum(signs) - len(signs)) / len(signs)
    assert logprobs.correlation(now, before, "kendall") == pytest.approx(expected)


def test_what_was_cut_is_not_scored_and_what_does_not_fit_is_null():
    rows = responses([("p0", "four", "stop"), ("p0", "cut", "length"), ("p0", "too long", "stop")])
    scored, drops = logprobs.score(prompts("Why?"), rows, Scores(), iteration=1, model="M1")
    assert [(row["response_id"], row["logprob"]) for row in scored.to_pylist()] == [("r0", -4.0), ("r2", None)]
    assert [(row["id"], row["reason"]) for row in drops.to_pylist()] == [("r2", "too_long")]
    assert logprobs.known(scored) == {"r0": -4.0}
    assert logprobs.per_token(scored) == {"r0": -2.0}


def test_a_ratio_needs_both():
    assert logprobs.ratio({"a": -3.0, "b": -4.0}, {"a": -5.0}) == {"a": 2.0}
