"""A response scored step by step: how it is cut, what the judge sees of it, and what the scores come to."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.looking import Cluster, planned
from srlm_core import eft, judgments, reasoning, recipes, report, settings, show, store
from srlm_core.backend import resolve
from srlm_core.config import EngineConfig, JudgmentsConfig, RunConfig, SamplingConfig
from srlm_core.engines.protocol import Completion, TokenScores
from srlm_core.engines.scripted import ScriptedEngine, base_model
from srlm_core.errors import ConfigError

# --- the cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("One thought only.", ["One thought only."]),
        ("1. Halve it.\n2. Add 3.\n3. Done.", ["1. Halve it.", "2. Add 3.", "3. Done."]),
        ("First:\n1) a\n   more of a\n2) b", ["First:", "1) a\n   more of a", "2) b"]),
        ("**Step 1:** a\nstill a\n### Step 2\nb", ["**Step 1:** a\nstill a", "### Step 2\nb"]),
        ("We halve it.\nThat is 4.\n\nThen add.\n\nSo 7.", ["We halve it.\nThat is 4.", "Then add.", "So 7."]),
        ("6 x 7\n= 42\nSo 42.", ["6 x 7", "= 42", "So 42."]),  # neither numbers nor paragraphs: lines
        ("1. a\n\n   more of a\n\n2. b", ["1. a\n\n   more of a", "2. b"]),  # an indented paragraph goes on
        ("1. only one\nof two lines", ["1. only one\nof two lines"]),
        ("It costs\n1.5 francs.\n\nIn\n2024: more.", ["It costs\n1.5 francs.", "In\n2024: more."]),
        ("Run:\n\n```\nx = 1\n\n1. y\n```\nThen z.", ["Run:", "```\nx = 1\n\n1. y\n```\nThen z."]),
        ("```\nnever closed\n\n1. a", ["```\nnever closed\n\n1. a"]),
        ("\n\n \n", [""]),
        ("", [""]),
        ("a\r\n\r\nb", ["a", "b"]),
    ],
)
def test_where_a_step_begins(response, steps):
    assert reasoning.cut(response) == steps


PIECES = st.sampled_from(["\n", "\n\n", " ", "1. ", "(2) ", "Step 3: ", "```\n", "\u2028", "\x1c", "\r\n", "#"])


@given(st.lists(PIECES | st.text(max_size=9), max_size=40).map("".join), st.integers(1, 6))
def test_the_steps_together_are_the_response(response, most):
    steps = reasoning.cut(response, most)
    assert " ".join(steps).split() == response.split()
    assert 1 <= len(steps) <= most
    assert all(steps) or steps == [""]
    assert reasoning.cut(response, most) == steps


def test_more_steps_than_there_may_be_make_the_last_one_longer():
    steps = reasoning.cut("\n".join(f"{n}. s" for n in range(1, 31)))
    assert len(steps) == reasoning.MOST == 20
    assert steps[-1].splitlines() == [f"{n}. s" for n in range(20, 31)]


def test_scores_together_as_worked_by_hand():
    assert reasoning.together([4, 2, 5], "min") == 2
    assert reasoning.together([4, 2, 5], "mean") == pytest.approx(11 / 3)
    assert reasoning.together([4, 2, 5], "last") == 5


@given(st.lists(st.floats(0, 5), min_size=1), st.sampled_from(["min", "mean", "last"]))
def test_a_score_stays_within_its_steps(scores, how):
    assert min(scores) - 1e-9 <= reasoning.together(scores, how) <= max(scores) + 1e-9


# --- what the judge is asked ----------------------------------------------------------------------------------------


class Judge:
    """Scores a step by the number in it; says nothing that can be read of one with `?`."""

    kind, context, capabilities = "test", 10**6, frozenset({"generate", "token_scores"})

    def __init__(self, too_long=""):
        self.asked, self.too_long = [], too_long

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            asked = request.messages[0]["content"]
            for index in range(request.n):
                if self.too_long and self.too_long in asked:
                    yield Completion(request.id, index, "", 0, "too_long")
                else:
                    yield Completion(request.id, index, self.says(asked), 3, "length" if "…" in step(asked) else "stop")

    def says(self, asked):
        said = step(asked)
        return "Who knows." if "?" in said else f"So it is.\nScore: {re.findall(r'[0-5]', said)[-1]}"

    def token_scores(self, requests, choices):
        for request in requests:
            point = step(request.messages[0]["content"]).split()[-1][0]
            scores = tuple(-0.001 if choice == point else -20.0 for choice in choices)
            yield TokenScores(request.id, None, "failed") if point == "?" else TokenScores(request.id, scores)


def step(asked):
    return asked.rpartition("<step>\n")[2].partition("\n</step>")[0]


RESPONSE = "1. Halve it. 4\n2. Add. 2\n3. So 5"


def judged(response, judge: Any = None, **changed):
    config = JudgmentsConfig(**{"steps": "min", "k": 1, **changed})
    work = [judgments.Task("t", "p", "What is it?", response)]
    engine: Any = judge or Judge()
    made, drops = judgments.judge(work, engine, config, iteration=1, judge_name="M1", seed=1)
    return made.to_pylist(), drops.to_pylist()


def test_pr1_what_is_scored_is_the_step_alone_and_what_came_before_is_in_the_prompt():
    judge = Judge()
    judged(RESPONSE, judge)
    asked = [request.messages[0]["content"] for request in judge.asked]
    assert [step(text) for text in asked] == ["1. Halve it. 4", "2. Add. 2", "3. So 5"]
    before = [text.partition("<before>\n")[2].partition("\n</before>")[0] for text in asked]
    assert before == ["", "1. Halve it. 4", "1. Halve it. 4\n\n2. Add. 2"]
    for earlier, later in itertools.pairwise(asked):  # what an engine has read of one serves the next
        assert later.startswith(earlier.partition("\n</before>")[0])
    assert all(request.prefix == "" for request in judge.asked)  # nothing of the response is put in the judge's mouth
    assert len({request.seed for request in judge.asked}) == 3


@pytest.mark.parametrize(("how", "score"), [("min", 2), ("mean", 11 / 3), ("last", 5)])
@pytest.mark.parametrize("reading", ["text", "guided", "expected"])
def test_the_score_of_a_response_in_every_reading(how, score, reading):
    (row,), drops = judged(RESPONSE, steps=how, reading=reading)
    assert row["verdict"] == pytest.approx(score, abs=1e-4)
    assert row["rubric"].startswith("step@")
    assert row["text"].startswith("Step 1 of 3:\nSo it is.\nScore: ")
    assert row["text"].endswith(f"{how} of 4, 2, 5: {score:.4g}") or reading == "expected"
    assert drops == []


def test_a_step_that_cannot_be_read_makes_no_number_and_says_which():
    (row,), _ = judged("1. Halve it. 4\n2. And ?\n3. Then ?")
    assert (row["verdict"], row["unreadable_reason"]) == (None, "no_score_line, step 2")
    assert row["text"].endswith("min of 4, null, null: null")
    (row,), _ = judged("1. Halve it. 4\n2. Cut… 3", steps="mean")
    assert (row["verdict"], row["unreadable_reason"], row["finish_reason"]) == (None, "truncated, step 2", "length")
    (row,), _ = judged("1. Halve it. 4\n2. So ?", reading="expected", justified=False)
    assert (row["verdict"], row["unreadable_reason"]) == (None, "no_answer, step 2")


def test_a_response_of_one_step_and_one_without_a_text():
    (row,), _ = judged("So 3")
    assert (row["verdict"], row["text"]) == (3, "Step 1 of 1:\nSo it is.\nScore: 3\n\nmin of 3: 3")
    (row,), _ = judged("   ", Lenient())
    assert row["verdict"] == 1


class Lenient(Judge):
    def says(self, asked):
        return "Nothing there.\nScore: 1"


def test_steps_that_do_not_fit_leave_the_response_out_with_the_first_of_them():
    rows, drops = judged(RESPONSE, Judge(too_long="<before>\n1. Halve it."))
    assert rows == []
    assert [(row["id"], row["reason"], row["detail"]) for row in drops] == [
        ("t", "judge_prompt_too_long", "step 2 of 3")
    ]


@pytest.mark.parametrize("tag", ["step", "before", "response", "request"])
def test_what_is_judged_cannot_close_its_fence(tag):
    judge = Lenient()
    judged(f"1. Halve. </{tag}>\n2. < /{tag.upper()} > So 4", judge)
    for request in judge.asked:
        assert request.messages[0]["content"].count(f"</{tag}>") == (tag != "response")


@pytest.mark.parametrize("reading", ["text", "guided", "expected"])
def test_added_passes_are_those_that_a_higher_k_would_have_made_at_first(tmp_path, reading):
    engine = ScriptedEngine(EngineConfig(kind="scripted", context=4000), base_model(tmp_path, 0.6))
    work = [judgments.Task(f"t{n}", "p", "Tides?", "1. Sound: a.\n2. Sound: b.\n3. Hollow.") for n in range(3)]

    def rows(k, first=0):
        config = JudgmentsConfig(reading=reading, k=k, steps="mean")
        made, _ = judgments.judge(work, engine, config, iteration=1, judge_name="M1", seed=1, first=first)
        return sorted(made.to_pylist(), key=lambda row: (row["target_id"], row["index"]))

    assert len(rows(3)) == 9
    assert sorted(rows(2) + rows(3, first=2), key=lambda row: (row["target_id"], row["index"])) == rows(3)


# --- in a campaign --------------------------------------------------------------------------------------------------


def test_a_campaign_judged_by_steps(scripted):
    folder = scripted("judgments.steps=min", "iterations=1")
    rows = list(store.iter_rows(folder / "iter_01" / "judgments"))
    assert rows
    assert {row["rubric"].partition("@")[0] for row in rows} == {"step"}
    responses = list(store.iter_rows(folder / "iter_01" / "responses"))
    assert len({(row["target_id"], row["index"]) for row in rows}) == len(rows) <= 3 * len(responses)
    told = show.show(folder, rows[0]["prompt_id"])
    assert "Step 1 of" in told
    assert "min of" in told
    report.write_report(folder)
    assert "step by step, and the response's score is the lowest" in (folder / "report" / "report.md").read_text()


def test_another_way_to_put_scores_together_judges_again_and_the_same_one_does_not(scripted):
    made = []

    def watch(what, told):
        if what == "part" and told["stage"] == "judgments" and told["iteration"]:
            made.append(told["reused"])

    sets = ("evaluation.models=none", "iterations=1")
    scripted(*sets, "judgments.steps=min")
    for how, reused in (("min", True), ("mean", False)):
        made.clear()
        scripted(*sets, f"judgments.steps={how}", observers=[watch])
        assert set(made) == {reused}


def test_off_it_is_in_no_fingerprint_and_eft_is_judged_whole():
    config = RunConfig()
    assert config.judgments.steps is None
    assert "judgments.steps" not in settings.pick(config, judgments.SETTINGS)
    assert judgments.texts(config) == [judgments.load_rubric("additive", justified=True).identity]
    by_steps = [judgments.texts(RunConfig(judgments=JudgmentsConfig(steps=how))) for how in ("min", "mean")]
    assert by_steps[0] != by_steps[1]
    assert eft.judging(config.seed_data, JudgmentsConfig(steps="last")).steps is None


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        ("meta_rewarding", [], r"method=meta_rewarding trains .* got judgments\.steps=min.*meta\.trains_judge=false"),
        ("spin", [], r"judgments\.steps=min scores .*method=spin has no judge"),
        ("sppo", [], r"judgments\.steps=min .*method=sppo"),
        ("dno", ["dno.judge_by=win_rate"], r"judgments\.steps=min .*method=dno"),
        ("self_rewarding", ['schedule=[{iteration=2, set={"judgments.steps"="min", "judgments.k"=3}}]'], None),
        ("meta_rewarding", ["meta.trains_judge=false"], None),
        ("dno", [], None),
    ],
)
def test_what_cannot_be_scored_by_steps_is_refused(recipe, sets, said, tmp_path):
    config = recipes.load(recipe, "smoke", [*sets, "judgments.steps=min"])
    if said is None:
        resolve(config)
        return
    for refusing in (resolve, lambda config: planned(config, tmp_path, Cluster())):
        with pytest.raises(ConfigError, match=said):
            refusing(config)


def test_a_way_that_there_is_not():
    with pytest.raises(ConfigError, match=r"judgments\.steps: expected .*'min', 'mean' or 'last'"):
        recipes.load("smoke", overrides=["judgments.steps=max"])


def test_passes_without_justification_need_one_pass_here_too():
    assert JudgmentsConfig(steps="mean", reading="expected", justified=False, k=1, sampling=SamplingConfig()).k == 1
