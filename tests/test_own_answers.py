"""Self-preference: where a model places its own answer among people's, against where a frozen judge does."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from suites.annotator import Annotator

from srlm_core import evaluation, own_answers, store
from srlm_core.judgments import Task
from srlm_core.report import write_report

GROUPS = [
    {"prompt": "p", "responses": [{"text": text, "rank": rank} for rank, text in enumerate("abc")]},
    {"prompt": "q", "responses": [{"text": text, "rank": rank} for rank, text in enumerate("de")]},
]
OWN = [Task("own p", "1", "p", "mine"), Task("own q", "2", "q", "mine, too")]


def key(prompt, text):
    return evaluation.response_key(prompt, text)


def test_a_place_is_the_share_of_peoples_responses_below():
    assert own_answers.place(3.0, [4.0, 3.0, 1.0]) == pytest.approx(0.5)
    assert own_answers.place(5.0, [4.0, 3.0]) == 1.0
    assert own_answers.place(0.0, [4.0, 3.0]) == 0.0


@given(st.floats(0, 5), st.lists(st.floats(0, 5), min_size=1))
def test_places_of_two_sides_are_each_others_rest(own, others):
    above = own_answers.place(own, others)
    below = own_answers.place(-own, [-other for other in others])
    assert above + below == pytest.approx(1)


def test_what_has_no_score_has_no_place():
    scores = {"own p": 3.0, "own q": 2.0, key("p", "a"): 4.0, key("p", "c"): 1.0}
    # b has no score: p lies above one of two; nothing of q is scored but the own answer
    assert own_answers.places(GROUPS, OWN, scores) == {"p": 0.5}
    assert own_answers.places(GROUPS, OWN, dict.fromkeys((key("p", "a"), key("q", "d")), 1.0)) == {}


def test_a_response_that_stands_twice_counts_once():
    twice = [{"prompt": "p", "responses": [{"text": text, "rank": 0} for text in "aab"]}]
    assert own_answers.places(twice, OWN, {"own p": 3.0, key("p", "a"): 4.0, key("p", "b"): 1.0}) == {"p": 0.5}


def test_self_preference_worked_by_hand():
    found = own_answers.measure({"p": 1.0, "q": 0.5, "r": 0.0}, {"p": 0.5, "q": 0.5, "s": 1.0})
    assert found["place"]["value"] == 0.5
    assert found["place_by_judge"] == {"value": 0.5, "stderr": 0.0, "n": 2}
    # 0.5 and 0: mean 1/4, deviations of 1/4, so the error is 0.25 / sqrt(2)
    assert found["self_preference"] == pytest.approx({"value": 0.25, "stderr": 0.25 / math.sqrt(2), "n": 2})
    assert "self_preference" not in own_answers.measure({"p": 1.0})


def test_models_answer_peoples_prompts_and_a_frozen_judge_says_how_much_they_like_themselves(tmp_path, scripted):
    sets = ("iterations=1", "evaluation.own_groups=4", "judgments.k=1")
    with Annotator(lambda text: dict.fromkeys("AB012345", -2.0)).serving() as name:
        endpoint = f"evaluation.judge={json.dumps(name)}"
        expected = ("judgments.reading=expected", "judgments.justified=false", "seed_data.eft_form=score")
        folder = scripted(*sets, *expected, endpoint)
    for model in ("M0", "sft_baseline", "M1", "M2"):
        found = store.read_json(folder / f"evaluation/{model}/results.json")["own_answers"]
        # the endpoint scores everything alike: an answer lies in the middle of the others
        assert found["place_by_judge"]["value"] == 0.5
        assert found["self_preference"]["value"] == pytest.approx(found["place"]["value"] - 0.5)
        assert found["self_preference"]["n"] == 4
    write_report(folder)
    assert "self\\-preference" in (folder / "report/report.md").read_text()


def test_a_model_cannot_be_its_own_frozen_judge_and_nothing_is_asked_twice(scripted):
    sets, parts = ("iterations=1", "evaluation.own_groups=3"), []
    folder = scripted(*sets)
    assert "self_preference" not in store.read_json(folder / "evaluation/M0/results.json")["own_answers"]
    assert "self_preference" in store.read_json(folder / "evaluation/M2/results.json")["own_answers"]
    scripted(*sets, observers=[lambda what, details: parts.append(details["reused"]) if what == "part" else None])
    assert parts
    assert all(parts)
    assert "self_preference" in store.read_json(folder / "evaluation/M2/results.json")["own_answers"]


def test_where_it_is_not_asked_for_there_is_nothing(scripted):
    folder = scripted("iterations=0", "evaluation.own_groups=0")
    assert "own_answers" not in store.read_json(folder / "evaluation/M1/results.json")
    assert not (folder / "evaluation/M1/own").exists()
