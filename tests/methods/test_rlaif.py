"""Constitutional AI on the scripted engine: what is revised and learnt, and how preferences become labels."""

import pyarrow as pa
import pytest
from tables import prompts, responses

from srlm_core import comparisons, recipes, report, revisions, store
from srlm_core.engines.protocol import Completion, Sampling, TokenScores
from srlm_core.errors import ConfigError
from srlm_core.methods import rlaif

ONE = ("responses.n=3", "evaluation.models=none")


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


class Rewrites:
    """An engine that criticises, and rewrites by adding a word; some answers come back as they were, cut or empty."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            said, talk = request.messages[-1]["content"], request.messages
            if said.startswith("Look at your answer"):
                yield Completion(request.id, 0, "" if "perfect" in talk[1]["content"] else "SECRET fault", 2, "stop")
            elif "cut" in talk[1]["content"]:
                yield Completion(request.id, 0, "half an", 2, "length")
            else:
                same = "fixed" in talk[1]["content"]
                yield Completion(request.id, 0, talk[1]["content"] + ("" if same else " better"), 2, "stop")


class Prefers:
    """A judge that gives what is shown first p = 0.69 and explains at length."""

    def generate(self, requests):
        return (Completion(request.id, 0, "Because.", 1, "stop") for request in requests)

    def token_scores(self, requests, choices):
        return (TokenScores(request.id, (-0.4, -1.2)) for request in requests)


def revised(texts, rounds=2):
    config = recipes.load("rlaif", "smoke", [f"rlaif.rounds={rounds}"])
    answers = responses([("p0", text, "stop") for text in texts]).to_pylist()
    engine = Rewrites()
    rows, drops = revisions.revise(prompts("Why?"), answers, engine, config, iteration=1, model="M1")
    return rows, drops, engine


def test_each_round_revises_what_the_one_before_left_under_a_principle_drawn_for_it():
    rows, drops, engine = revised(["one", "two"])
    assert [(row["response_id"], row["round"], row["revision"]) for row in rows.to_pylist()] == [
        ("r0", 0, "one better"), ("r0", 1, "one better better"),
        ("r1", 0, "two better"), ("r1", 1, "two better better"),
    ]  # fmt: skip
    assert revisions.last(rows)["r0"]["revision"] == "one better better"
    assert {row["principle"] for row in rows.to_pylist()} <= {of.id for of in revisions.principles("harmless")}
    assert rows.equals(revised(["one", "two"])[0])
    assert drops.num_rows == 0
    second = [request for request in engine.asked if request.messages[1]["content"] == "one better"]
    assert [message["role"] for message in second[-1].messages] == ["user", "assistant", "user", "assistant", "user"]


def test_a_cut_revision_is_null_and_ends_the_rounds_and_no_critique_is_no_revision():
    rows, drops, _ = revised(["to be cut", "perfect"])
    assert [(row["response_id"], row["revision"], row["finish_reason"]) for row in rows.to_pylist()] == [
        ("r0", None, "length")
    ]
    assert revisions.last(rows) == {}
    assert [(row["id"], row["reason"]) for row in drops.to_pylist()] == [("r1", "not_revised")]


def test_an_unchanged_answer_and_a_critique_are_never_learnt():
    rows, _, _ = revised(["fixed", "one"], rounds=1)
    first = responses([("p0", "fixed", "stop"), ("p0", "one", "stop")])
    whole = {"prompts": [prompts("Why?")], "answers": [first], "revisions": [rows]}
    seed = type("Seed", (), {"ift": [{"instruction": "What?", "response": "That."}]})
    learnt = pa.concat_tables(rlaif.lessons(recipes.load("rlaif", "smoke"), seed, whole)).to_pylist()
    assert [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in learnt] == [
        ("Why?", "one better"), ("What?", "That."),
    ]  # fmt: skip
    assert "SECRET" not in str(learnt)


def preferred(config, explained=None):
    played = comparisons.all_pairs(prompts("Why?"), responses([("p0", "a", "stop"), ("p0", "b", "stop")]).to_pylist())
    also = {"p0": {"principle": "Be kind."}}
    return comparisons.compare(played, Prefers(), judge_name="M0", rubric=rlaif._rubric(config), also=also,
                               explained=explained)[0]  # fmt: skip


def test_the_principle_is_in_what_the_judge_is_asked_and_the_order_is_averaged_out():
    rows = preferred(recipes.load("rlaif", "smoke"))
    assert [row["verdict"] for row in rows.to_pylist()] == [0.69, 0.69]  # 1 / (1 + exp(-0.8)) = 0.689974
    assert comparisons.win_rates(rows).p["r0", "r1"] == pytest.approx(0.5)


def test_an_explanation_is_kept_before_the_verdict():
    rows = preferred(recipes.load("rlaif", "smoke", ["rlaif.justified=true"]), Sampling())
    assert rows["text"][0].as_py() == "Because.\nBetter: A:0.690 B:0.310"


@pytest.mark.parametrize(
    ("setting", "p", "worth"),
    [
        ("rlaif.justified=false", 0.689974, 0.689974),
        ("rlaif.justified=true", 0.689974, 0.6),
        ("rlaif.justified=true", 0.55, 0.55),
        ("rlaif.labels=hard", 0.689974, 1.0),
    ],
)
def test_a_label_is_clamped_only_after_an_explanation(setting, p, worth):
    assert rlaif.label(p, recipes.load("rlaif", "smoke", [setting])) == pytest.approx(worth)


def test_a_campaign_learns_the_revisions_then_preferences_of_what_came_of_it(scripted):
    folder = scripted(*ONE, recipe="rlaif", name="rlaif")
    revised_by, learnt = read(folder, "revisions"), store.read_json(folder / "models" / "M1_revised" / "complete.json")
    assert {row["model"] for row in revised_by} == {"M1"}
    assert (learnt["kind"], learnt["init_from"][0]) == ("sft", "M0")
    assert {row["model"] for row in read(folder, "responses")} == {"M1_revised"}
    assert {row["judge"] for row in read(folder, "preferences")} == {"M0"}
    trained = store.read_json(folder / "models" / "M2" / "complete.json")
    assert trained["init_from"][0] == trained["reference"][0] == "M1_revised"
    rows = read(folder, "pairs")
    assert rows
    assert all(0.5 < row["label"] <= 1 for row in rows)
    report.write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "answers that were revised" in page
    assert "M1\\_revised" not in page.split("## Table of iterations")[1].split("##")[0]


def test_more_rounds_sample_no_answer_again(scripted):
    scripted(*ONE, recipe="rlaif", name="rlaif")
    made = []

    def watch(what, told):
        if what == "part" and not told["reused"]:
            made.append(told["stage"])

    scripted(*ONE, "rlaif.labels=hard", recipe="rlaif", name="rlaif", observers=[watch])
    assert set(made) == {"pairs"}


def test_principles_of_ones_own_and_a_file_without_any(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\nBe brief.\nBe kind.\n")
    assert [principle.text for principle in revisions.principles(str(path))] == ["Be brief.", "Be kind."]
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="expected a principle a line"):
        revisions.principles(str(path))
    with pytest.raises(ConfigError, match=r"rlaif\.principles: expected one of"):
        revisions.principles("polite")


def test_the_shipped_principles_are_sixteen_different_ones():
    assert len({principle.id for principle in revisions.principles("harmless")}) == 16
