"""Responses compared two by two: who meets, in which orders, and what it comes to."""

import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import comparisons
from srlm_core.engines.protocol import TokenScores
from tests.tables import prompts, responses


class Longer:
    """A judge that takes the longer response, and what is shown first by `pull` more, in log-odds."""

    def __init__(self, pull=0.0, silent=lambda number: None):
        self.pull, self.silent = pull, silent

    def token_scores(self, requests, choices):
        for number, request in enumerate(requests):
            first, second = request.messages[0]["content"].split("Response A:")[1].split("Response B:")
            odds = len(first) - len(second.split("Which response")[0]) + self.pull
            why = self.silent(number)
            yield TokenScores(request.id, None, why) if why else TokenScores(request.id, (odds, 0.0))


SAID = [("p0", "aaaa", "stop"), ("p0", "aaa", "stop"), ("p0", "a", "stop"), ("p1", "bb", "stop")]


def compared(judge):
    asked, said = prompts("one?", "two?"), responses(SAID)
    played = comparisons.all_pairs(asked, said.to_pylist())
    return comparisons.compare(played, judge, judge_name="J", iteration=3, stage="comparisons")


def test_each_two_responses_of_a_prompt_meet_in_both_orders():
    rows, drops = compared(Longer())
    met = {(row["target_id"], row["other_id"], row["first"]) for row in rows.to_pylist()}
    pairs = list(itertools.combinations(("r0", "r1", "r2"), 2))
    assert met == {(a, b, first) for a, b in pairs for first in (a, b)}
    assert set(rows["iteration"].to_pylist()) == {3}
    assert drops.num_rows == 0


def test_what_gave_no_answer_is_dropped_with_its_reason_and_the_other_order_alone_counts_for_nothing():
    rows, drops = compared(Longer(silent={0: "too_long", 2: "failed", 3: "failed"}.get))
    assert drops["reason"].to_pylist() == ["judge_prompt_too_long", "no_answer", "no_answer"]
    assert set(drops["stage"].to_pylist()) == {"comparisons"}
    assert len(set(drops["id"].to_pylist())) == 3
    found = comparisons.win_rates(rows)
    assert set(found.p) == {("r1", "r2"), ("r2", "r1")}
    assert set(found.mean) == {"r1", "r2"}  # r0 met r1 in one order and r2 in none
    assert found.missing == 1


def row(a, b, first, verdict):
    return {"target_id": a, "other_id": b, "first": first, "verdict": verdict}


def table(*rows):
    schema = {name: pa.string() for name in ("target_id", "other_id", "first")} | {"verdict": pa.float64()}
    return pa.Table.from_pylist(list(rows), schema=pa.schema(schema))


def test_win_rates_as_worked_by_hand():
    found = comparisons.win_rates(
        table(
            row("A", "B", "A", 0.9), row("A", "B", "B", 0.3), row("A", "C", "A", 0.6), row("A", "C", "C", 0.4),
            row("B", "C", "B", 0.9), row("B", "C", "C", None),
        )
    )  # fmt: skip
    assert found.p[("A", "B")] == pytest.approx(0.8)
    assert found.p[("B", "A")] == pytest.approx(0.2)
    assert found.mean == pytest.approx({"A": 0.7, "B": 0.2, "C": 0.4})
    assert found.missing == 1


def test_a_pull_of_the_order_flips_what_is_near_and_cancels():
    """Lengths 4, 3, 1; a pull of 1.5 is more than the one character between the first two, less than the others."""
    rows, _ = compared(Longer(pull=1.5))
    assert comparisons.flips(rows) == [1, 0, 0]
    fair, _ = compared(Longer())
    assert comparisons.flips(fair) == [0, 0, 0]
    ranked = [sorted(comparisons.win_rates(of).mean.items(), key=lambda item: -item[1]) for of in (rows, fair)]
    assert [name for name, _ in ranked[0]] == [name for name, _ in ranked[1]] == ["r0", "r1", "r2"]


@given(st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_the_matrix_sums_to_one_both_ways_and_means_average_to_a_half(verdicts):
    told = iter(verdicts)
    meetings = [(a, b, first) for a, b in itertools.combinations("ABCD", 2) for first in (a, b)]
    rows = [row(a, b, first, next(told)) for a, b, first in meetings]
    found = comparisons.win_rates(table(*rows))
    assert all(found.p[a, b] + found.p[b, a] == pytest.approx(1) for a, b in found.p)
    assert all(0 <= value <= 1 for value in found.mean.values())
    assert sum(found.mean.values()) / 4 == pytest.approx(0.5)
    assert comparisons.win_rates(table(*reversed(rows))).mean == pytest.approx(found.mean)


def test_nothing_compared():
    assert comparisons.win_rates(table()) == ({}, {}, 0)
    assert comparisons.all_pairs(prompts("one?"), []) == []
