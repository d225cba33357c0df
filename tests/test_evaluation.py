import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import judgments, prompts, responses

from srlm_core import comparisons, evaluation
from srlm_core.config import EngineConfig
from srlm_core.engines.protocol import TokenScores
from srlm_core.engines.scripted import ScriptedEngine, base_model


def group(*scores, lengths=None):
    """Responses in human order, best first."""
    lengths = lengths or [10] * len(scores)
    return [
        evaluation.Ranked(rank, score, length) for rank, (score, length) in enumerate(zip(scores, lengths, strict=True))
    ]


GOLDEN = [group(5, 4, 4), group(4, 5, 3, 1), group(3, 2), group(5, 5)]


@pytest.mark.parametrize(
    ("scores", "correct", "pairs", "ties", "exact", "spearman", "tau", "full", "best"),
    [
        ((5, 4, 4), 2, 3, 1, False, 0.866025, 0.816497, 1, 1),
        ((4, 5, 3, 1), 5, 6, 0, False, 0.8, 0.666667, 1, 0),
        ((3, 2), 1, 1, 0, True, 1, 1, 0, 0),
        ((5, 5), 0, 1, 1, False, None, None, 2, 1),
    ],
)
def test_the_worked_rows(scores, correct, pairs, ties, exact, spearman, tau, full, best):
    found = evaluation.measure_group(group(*scores))
    assert (found.correct, found.n_pairs, found.ties, found.exact) == (correct, pairs, ties, exact)
    assert (found.n_full, found.full_and_best) == (full, best)
    assert found.spearman == (None if spearman is None else pytest.approx(spearman, abs=1e-5))
    assert found.kendall == (None if tau is None else pytest.approx(tau, abs=1e-5))


def test_the_worked_table():
    found = evaluation.measure_judge(GOLDEN, samples=50, seed=0)
    assert found["pairwise_accuracy"]["value"] == pytest.approx(8 / 11)
    assert found["pairwise_accuracy_tie_half"]["value"] == pytest.approx(9 / 11)
    assert found["pairwise_accuracy_no_ties"]["value"] == pytest.approx(8 / 9)
    assert found["tie_rate"]["value"] == pytest.approx(2 / 11)
    assert found["exact_match"]["value"] == 0.25
    assert found["five_best"]["value"] == 0.5
    assert found["spearman"]["value"] == pytest.approx(0.666506, abs=1e-5)
    assert found["spearman_defined"]["value"] == pytest.approx(0.888675, abs=1e-5)
    assert found["kendall"]["value"] == pytest.approx(0.620791, abs=1e-5)
    assert found["kendall_defined"]["value"] == pytest.approx(0.827721, abs=1e-5)
    assert found["n_undefined"] == 1
    assert found["pairwise_accuracy"]["n"] == 11
    assert found["pairwise_accuracy"]["stderr"] > 0


def test_a_response_without_a_score_is_in_no_pair():
    found = evaluation.measure_group(group(5, None, 1))
    assert (found.n_pairs, found.correct, found.exact) == (1, 1, None)


def test_the_length_baseline_counts_how_often_the_longer_is_the_better():
    found = evaluation.measure_judge([group(5, 4, 3, lengths=[9, 20, 3])], samples=10, seed=0)
    assert found["longer_accuracy"]["value"] == pytest.approx(2 / 3)  # 9 < 20 wrong, 9 > 3 right, 20 > 3 right


def test_pairs_of_nearly_equal_length_stand_apart():
    found = evaluation.measure_judge([group(5, 4, 4, 1, lengths=[10, 8, 8, 20])], samples=10, seed=0)
    # 10 and 8 (twice): right; 8 and 8: a tie, wrong; 20 is near none
    assert found["pairwise_accuracy_near_length"]["value"] == pytest.approx(2 / 3)
    assert found["pairwise_accuracy_near_length"]["n"] == 3
    assert found["pairwise_accuracy"]["n"] == 6


def test_the_pull_of_length_is_seen_where_people_saw_no_difference():
    alike = [evaluation.Ranked(0, score, length) for score, length in [(3, 10), (4, 20), (4, 30), (None, 40), (5, 30)]]
    found = evaluation.measure_judge([alike], samples=10, seed=0)
    # 10: below 20, 30 and 30; 20: level with the first 30 (half), below the second; 30 and 30 say nothing
    assert found["longer_preferred_at_equal_rank"]["value"] == pytest.approx(4.5 / 5)
    assert found["longer_preferred_at_equal_rank"]["n"] == 5
    assert found["pairwise_accuracy"]["n"] == 0


def test_a_response_that_stands_twice_in_a_file_is_judged_once():
    twice = {"prompt": "p", "responses": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]}
    assert [task.response for task in evaluation.group_tasks([twice, twice])] == ["a", "b"]


def test_nothing_measured_is_null_not_zero():
    found = evaluation.measure_judge([group(None, None)], samples=10, seed=0)
    assert found["pairwise_accuracy"] == {"value": None, "stderr": None, "n": 0}


def test_a_rate_with_its_error():
    found = evaluation.rate([1.0] * 164 + [0.0] * 92)  # sqrt(0.64 * 0.36 / 256) = 0.03
    assert found.value == pytest.approx(0.640625)
    assert found.stderr == pytest.approx(0.03, abs=1e-4)


class Prefers:
    """A judge that prefers answers which hold a word, or whatever is shown first."""

    kind, context, capabilities = "test", 1000, frozenset({"token_scores"})

    def __init__(self, word):
        self.word = word

    def token_scores(self, requests, choices):
        for request in requests:
            asked = request.messages[0]["content"]
            first = True if self.word is None else self.word in asked.split("Response A:")[1].split("Response B:")[0]
            yield TokenScores(request.id, (-0.1, -2.4) if first else (-2.4, -0.1))


def played(word):
    asked = prompts("one?", "two?")
    a = responses([("p0", "good a0", "stop"), ("p1", "good a1", "stop")])
    b = responses([("p0", "b0", "stop"), ("p1", "b1", "stop")])
    b = b.set_column(0, b.schema.field(0), [["s0", "s1"]])
    rows, _ = comparisons.compare(evaluation.matches(asked, a, b), Prefers(word), judge_name="J")
    return evaluation.tally(rows)


def test_a_judge_that_prefers_a_response_does_so_in_both_orders():
    assert played("good")["win"]["value"] == 1
    assert played("b")["lose"]["value"] == 1


def test_the_pull_of_the_order():
    responses_of = [{"text": "bad", "rank": 2}, {"text": "good", "rank": 0}, {"text": "fair", "rank": 1}]
    played = evaluation.best_against_worst([{"prompt": p, "responses": responses_of} for p in ("one?", "two?")])
    assert [(match.a, match.b) for match in played] == [("good", "bad")] * 2

    def pull(word):
        return evaluation.pull_of_order(comparisons.compare(played, Prefers(word), judge_name="J")[0])

    assert {key: value["value"] for key, value in pull("good").items()} == {
        "first_preferred": 0.5, "better_preferred": 1, "flip_rate": 0,
    }  # fmt: skip
    assert {key: value["value"] for key, value in pull(None).items()} == {
        "first_preferred": 1, "better_preferred": 0.5, "flip_rate": 1,
    }  # fmt: skip


def test_points_at_equal_length_as_worked_by_hand():
    """Of four longer answers three win, of four shorter ones two: theta = ln(3) / 2, its sigmoid 0.634."""
    games = [(1, True)] * 3 + [(1, False)] + [(-1, True)] * 2 + [(-1, False)] * 2
    rows, lengths = [], {}
    for n, (longer, won) in enumerate(games):
        a, b = f"a{n}", f"b{n}"
        lengths |= {a: 500 + 200 * longer, b: 500 - 200 * longer}
        for first, verdict in ((a, 0.9 if won else 0.1), (b, 0.1 if won else 0.9)):
            rows.append({"target_id": a, "other_id": b, "first": first, "verdict": verdict})
    found = evaluation.tally(pa.Table.from_pylist(rows), lengths)
    assert found["win_or_half_tie"]["value"] == pytest.approx(5 / 8)
    assert found["length_controlled"]["value"] == pytest.approx(0.633975, abs=1e-5)
    assert found["length_controlled"]["n"] == 8
    assert found["longer"]["value"] == 0.5
    nobody = evaluation.tally(pa.Table.from_pylist(rows).slice(0, 0), {})
    assert nobody["length_controlled"] == {"value": None, "stderr": None, "n": 0}


def test_a_judge_that_takes_the_first_gives_ties_and_flips():
    found = played(None)
    assert found["tie"]["value"] == 1
    assert found["flip_rate"]["value"] == 1
    assert found["win_or_half_tie"]["value"] == 0.5


def by_place(*results):
    return {(f"a{i}", f"b{i}"): result for i, result in enumerate(results)}


def test_two_judges_agreement_worked_by_hand():
    found = evaluation.agreement(by_place(1, 0.5, 0, 1), by_place(1, 0, 0, 0.5))
    assert found["same"] == {"value": 0.5, "stderr": 0.25, "n": 4}
    # by chance: 1/2 1/4 + 1/4 1/4 + 1/4 1/2 = 5/16
    assert found["kappa"] == pytest.approx((1 / 2 - 5 / 16) / (1 - 5 / 16))
    assert evaluation.agreement(by_place(1, 1), by_place(1, 0))["kappa"] is None
    assert evaluation.agreement(by_place(1), {})["same"]["n"] == 0


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)), min_size=1, max_size=10))
def test_swapping_the_models_mirrors_the_result(chances):
    points = [evaluation._point(a, b) for a, b in chances]
    mirrored = [evaluation._point(1 - b, 1 - a) for a, b in chances]
    assert [1 - point for point in points] == mirrored


def test_attacks_are_measured_as_the_shift_they_win():
    attacks = [
        {"form": "order", "prompt": "p", "response": "r", "attack": "x"},
        {"form": "quote", "prompt": "p", "response": "r", "attack": "y", "position": "before"},
    ]
    tasks = evaluation.attack_tasks(attacks)
    assert [task.response for task in tasks] == ["r", "r\n\nx", "r", "y\n\nr"]
    scores = dict(zip((task.target_id for task in tasks), (2.0, 5.0, 2.0, 1.0), strict=True))
    found = evaluation.attack_shift(attacks, scores)
    assert found["shift"]["value"] == 1.0  # (+3 - 1) / 2
    assert found["by_form"] == {"order": 3.0, "quote": -1.0}


def test_a_better_scripted_judge_agrees_more_with_the_truth(tmp_path):
    def accuracy(skill):
        engine = ScriptedEngine(EngineConfig(kind="scripted"), base_model(tmp_path / str(skill), skill))
        from srlm_core import judgments
        from srlm_core.config import JudgmentsConfig

        groups = [
            {"prompt": f"q{n}", "responses": [{"text": "Sound: x. " * q + f"{n}", "rank": 5 - q} for q in range(5)]}
            for n in range(40)
        ]
        rows, _ = judgments.judge(
            evaluation.group_tasks(groups), engine, JudgmentsConfig(k=1), iteration=0, judge_name="J", seed=1
        )
        scores = {key: score.mean for key, score in judgments.scores(rows, k=1, required=1).items()}
        return evaluation.measure_judge(evaluation.ranked(groups, scores), samples=10, seed=0)["pairwise_accuracy"][
            "value"
        ]

    assert accuracy(0.95) > accuracy(0.0) + 0.05


def test_judge_health_as_worked_by_hand():
    table = judgments([("a", 0, 4), ("a", 1, 4), ("a", 2, 3), ("b", 0, 5), ("b", 1, None), ("c", 0, 2), ("c", 1, 2)])
    found = evaluation.judge_health(table, {"a": 30, "b": 40, "c": 10})
    assert found["readable_rate"]["value"] == pytest.approx(6 / 7)
    assert found["unreadable"] == {"no_score_line": 1}
    assert found["score"]["value"] == pytest.approx((11 / 3 + 5 + 2) / 3)
    assert found["histogram"] == {"0": 0, "1": 0, "2": 2, "3": 1, "4": 2, "5": 1}
    assert found["entropy_bits"] == pytest.approx(1.918296)  # of shares 1/3, 1/6, 1/3, 1/6
    assert found["pass_agreement"] == {"value": pytest.approx(2 / 3), "stderr": pytest.approx(2**0.5 / 6), "n": 2}
    assert found["spread_over_passes"] == pytest.approx((2**0.5 / 3 + 0) / 2)
    assert found["score_length_correlation"] == pytest.approx(1)
    nothing = evaluation.judge_health(table.slice(0, 0))
    assert (nothing["score"]["value"], nothing["pass_agreement"]["value"], nothing["entropy_bits"]) == (None,) * 3
