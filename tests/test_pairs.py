import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tables import prompts, responses

from srlm_core import pairs
from srlm_core.config import PairsConfig

FOUR = [("p0", f"answer number {i}", "stop") for i in range(4)]


def paired(rows, scores, config=None, texts=("Why?",)):
    return pairs.best_and_worst(prompts(*texts), responses(rows), scores, config or PairsConfig(), iteration=1)


def test_the_best_is_chosen_and_the_worst_rejected():
    made, drops = paired(FOUR, {"r0": 2.0, "r1": 4.33, "r2": 4.0, "r3": 1.5})
    row = made.to_pylist()[0]
    assert (row["chosen_id"], row["rejected_id"], row["chosen_score"], row["rejected_score"]) == ("r1", "r3", 4.33, 1.5)
    assert drops.num_rows == 0


def test_a_tie_makes_no_pair_and_the_next_prompt_is_still_processed():
    rows = [*FOUR, *[("p1", text, "stop") for text in "ab"]]
    made, drops = paired(rows, {"r0": 3, "r1": 3, "r2": 3, "r3": 3, "r4": 1, "r5": 2}, texts=("Why?", "How?"))
    assert made["prompt_id"].to_pylist() == ["p1"]
    assert [(row["id"], row["reason"]) for row in drops.to_pylist()] == [("p0", "tie")]


def test_what_is_no_tie_is_not_called_one():
    """As the 135M model's answers were: all but one were cut, so that nothing was left to hold it against."""
    cut = [("p0", "one", "stop"), *[("p0", text, "length") for text in ("two", "three")]]
    _, drops = paired(cut, {"r0": 2.38, "r1": 2.31, "r2": 2.29})
    assert drops["reason"].to_pylist() == ["only_one_may_be_paired"]
    _, drops = paired(cut, {"r0": 2.3, "r1": 2.31, "r2": 2.39}, PairsConfig(truncated_rejected=True))
    assert drops["reason"].to_pylist() == ["none_better_may_be_chosen"]
    _, drops = paired(cut, {"r0": 2.3, "r1": 2.3, "r2": 2.3}, PairsConfig(truncated_rejected=True))
    assert drops["reason"].to_pylist() == ["tie"]


def test_means_that_differ_in_the_last_bit_are_a_tie():
    _, drops = paired(FOUR[:2], {"r0": 0.1 + 0.2, "r1": 0.3})
    assert drops["reason"].to_pylist() == ["tie"]


def test_a_response_without_a_score_is_in_no_pair():
    made, _ = paired(FOUR, {"r1": 4, "r2": 3})
    assert {made["chosen_id"][0].as_py(), made["rejected_id"][0].as_py()} == {"r1", "r2"}
    _, drops = paired(FOUR, {"r1": 4})
    assert drops["reason"].to_pylist() == ["fewer_than_two_scored"]


def test_a_cut_response_is_never_chosen_and_rejected_only_where_a_setting_says_so():
    rows = [("p0", "cut", "length"), ("p0", "fine", "stop"), ("p0", "fair", "stop")]
    made, _ = paired(rows, {"r0": 5, "r1": 4, "r2": 3})
    assert made["chosen_id"].to_pylist() == ["r1"]
    assert paired(rows, {"r0": 0, "r1": 4, "r2": 3})[0]["rejected_id"].to_pylist() == ["r2"]
    assert paired(rows, {"r0": 0, "r1": 4, "r2": 3}, PairsConfig(truncated_rejected=True))[0][
        "rejected_id"
    ].to_pylist() == ["r0"]


def test_a_loop_is_never_chosen():
    rows = [
        ("p0", "so it goes on " * 20, "stop"),
        ("p0", "A plain answer of several words.", "stop"),
        ("p0", "No.", "stop"),
    ]
    made, _ = paired(rows, {"r0": 5, "r1": 4, "r2": 1})
    assert made["chosen_id"].to_pylist() == ["r1"]


def test_a_pair_below_the_margin_is_dropped_for_that_reason():
    _, drops = paired(FOUR[:2], {"r0": 3.0, "r1": 3.5}, PairsConfig(min_margin=1))
    assert drops["reason"].to_pylist() == ["margin_too_small"]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 5)), st.booleans()), max_size=24),
    st.randoms(use_true_random=False),
)
def test_chosen_scores_above_rejected_and_row_order_does_not_matter(drawn, rng):
    rows = [(f"p{p}", f"text {i}", "stop" if ended else "length") for i, (p, _, ended) in enumerate(drawn)]
    scores = {f"r{i}": float(score) for i, (_, score, _) in enumerate(drawn) if score is not None}
    table = responses(rows)
    asked = prompts("a?", "b?", "c?", "d?")
    made, drops = pairs.best_and_worst(asked, table, scores, PairsConfig(), iteration=1)
    for row in made.to_pylist():
        assert row["chosen_score"] > row["rejected_score"]
        assert row["chosen_id"] in scores
        assert row["rejected_id"] in scores
    assert made.num_rows + drops.num_rows == 4  # no count is a mystery
    order = list(range(table.num_rows))
    rng.shuffle(order)
    assert pairs.best_and_worst(asked, table.take(pa.array(order, pa.int64())), scores, PairsConfig(), iteration=1)[
        0
    ].equals(made)


LENGTHS = (1900, 1200, 2400, 900)


def test_length_control_of_the_worked_example():
    rows = [("p0", "".join(chr(97 + i) for _ in range(n)), "stop") for i, n in enumerate(LENGTHS)]
    scores = {"r0": 4.6, "r1": 4.2, "r2": 3.0, "r3": 2.6}
    for rho, expected in ((0, ("r0", "r3")), (0.2, ("r1", "r2")), (0.32, ("r1", "r2")), (0.4, ("r1", "r2"))):
        made, _ = paired(rows, scores, PairsConfig(length_control=rho))
        assert (made["chosen_id"][0].as_py(), made["rejected_id"][0].as_py()) == expected, rho


def test_of_equally_long_ones_the_first_is_taken():
    rows = [("p0", text, "stop") for text in ("aaa", "bbb", "ccc", "ddd")]
    made, _ = paired(rows, {"r0": 4.0, "r1": 4.1, "r2": 1.1, "r3": 1.0}, PairsConfig(length_control=0.1))
    assert (made["chosen_id"][0].as_py(), made["rejected_id"][0].as_py()) == ("r0", "r2")


def test_half_the_range_would_let_the_tiers_overlap():
    with pytest.raises(ValidationError):
        PairsConfig(length_control=0.5)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 60)), min_size=2, max_size=7), st.floats(0, 0.49))
def test_under_length_control_chosen_is_no_worse_scored_than_rejected(drawn, rho):
    rows = [("p0", f"{number} " + "x" * length, "stop") for number, (_, length) in enumerate(drawn)]
    made, drops = paired(rows, {f"r{i}": score for i, (score, _) in enumerate(drawn)}, PairsConfig(length_control=rho))
    for row in made.to_pylist():
        assert row["chosen_score"] > row["rejected_score"]
        assert row["chosen_id"] != row["rejected_id"]
    assert made.num_rows + drops.num_rows == 1


def test_a_response_that_is_too_long_is_never_chosen():
    rows = [("p0", "a long answer", "stop"), ("p0", "short", "stop"), ("p0", "no", "stop")]
    made, _ = paired(rows, {"r0": 5, "r1": 4, "r2": 1}, PairsConfig(max_chosen_chars=5))
    assert made["chosen_id"].to_pylist() == ["r1"]


def test_the_worked_example_of_length_control_by_places():
    scores = (4.6, 4.2, 3.0, 2.6)
    for rho, expected in ((0, (0, 3)), (0.2, (1, 2)), (0.32, (1, 2)), (0.4, (1, 2))):
        assert pairs.extremes(scores, LENGTHS, rho) == expected, rho
    assert pairs.extremes((3.0, 3.0), (1, 2), 0.3) is None
    assert pairs.extremes((5.0, 4.0, 1.0), (1, 1, 1), may_be_chosen=[1, 2], may_be_rejected=[0, 1]) is None
