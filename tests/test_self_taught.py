"""Judge data without people's judgments: whose order is known by how the worse response was made."""

import json
from collections import Counter
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from suites.annotator import Annotator

from flows.looking import Cluster, planned
from srlm_core import comparisons, recipes, report, schemas, self_taught, settings, store
from srlm_core.backend import resolve
from srlm_core.comparisons import Match
from srlm_core.config import RunConfig, SamplingConfig
from srlm_core.contamination import Watch
from srlm_core.engines.protocol import Completion
from srlm_core.errors import ConfigError, NothingLeft

# --- the verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The first is right.\nBetter: A", 1),
        ("The second is right.\n**Better: B**", 0),
        ("Because.\nbetter = [B]", 0),
        ("Because.\nBetter: A, since it is complete.", 1),
        ("So it is.\nBetter: A\nI say again:\nBetter: A", 1),
        ("So.\nBetter: A\nNo.\nBetter: B", "both_named"),  # ST-1
        ("So.\nBetter: A or Better: B", "both_named"),
        ("So.\nBetter: A or B", "both_named"),
        ("So.\nBetter: A/B", "both_named"),
        ("A is better.", "none_named"),
        ("Which is better: a response that helps.", "none_named"),
        ("Better: C", "none_named"),
        ("", "none_named"),
        ("Better: A", "no_explanation"),
        ("**Better: A**", "no_explanation"),
    ],
)
def test_st1_a_verdict_that_names_both_or_none_is_null(text, verdict):
    found = comparisons.parse_better(text, "stop")
    assert found == ((None, verdict) if isinstance(verdict, str) else (verdict, None))


def test_a_verdict_that_was_cut_is_null():
    assert comparisons.parse_better("So.\nBetter: A", "length") == (None, "truncated")
    assert comparisons.parse_better("", "failed") == (None, "no_answer")


@given(st.text(max_size=80), st.sampled_from(["stop", "length", "failed"]))
def test_a_verdict_is_one_of_two_or_null_with_a_reason(text, finish_reason):
    value, why = comparisons.parse_better(text, finish_reason)
    assert value in (None, 0, 1)
    assert (value is None) == (why is not None)


# --- worked by hand -------------------------------------------------------------------------------------------------

IFT = [
    {"instruction": f"What is {thing}?", "response": f"{thing} is a thing."} for thing in ("tea", "ink", "sand", "wax")
]
HOW = SamplingConfig()


class Model:
    """Writes by a table of what is asked; compares by always explaining, then saying `says(order, pass)`."""

    def __init__(self, says=lambda asked, index: "", written=lambda asked: "Something else.\n"):
        self.says, self.written, self.asked = says, written, []

    def generate(self, requests):
        for request in requests:
            asked = request.messages[-1]["content"]
            self.asked.append(asked)
            for index in range(request.n):
                text = self.says(asked, index) if "Response A:" in asked else self.written(asked)
                yield text if isinstance(text, Completion) else Completion(request.id, index, text, 3, "stop")


def made(model: Any, watch=None):
    modified, _ = self_taught.modify(IFT, model, HOW, model="S", seed=1)
    asked, no_request = self_taught.usable(IFT, modified, watch or Watch({}))
    answered = self_taught.responses.respond(asked, model, HOW, n=1, iteration=0, model="S", seed=1)[0]
    played, no_answer = self_taught.matches(IFT, asked, answered)
    return played, dict(no_request + no_answer)


def test_the_answer_to_another_request_is_the_worse_response():
    def written(asked):
        if not asked.startswith("Write another request"):
            return f"It is an answer to: {asked}"
        return "  Who sells it?\n" if "tea" in asked else "Who makes ink?" if "ink" in asked else asked.split("\n")[4]

    played, aside = made(Model(written=written))
    assert [(m.prompt, m.a, m.b) for m in played] == [
        ("What is tea?", "tea is a thing.", "It is an answer to: Who sells it?"),
        ("What is ink?", "ink is a thing.", "It is an answer to: Who makes ink?"),
    ]
    why = "another request: the same as the instruction"
    assert aside == {"What is sand?": why, "What is wax?": why}


def test_what_cannot_be_used_is_set_aside_with_its_reason():
    def written(asked):
        if asked.startswith("Write another request"):
            for thing, text in (("tea", " .. "), ("ink", "How is glass blown in a hot shop in Venice?")):
                if thing in asked:
                    return text
            return "What is salt?" if "sand" in asked else "What is soap?"
        return "Sand IS a thing!" if "salt" in asked else ""

    played, aside = made(Model(written=written), Watch({"heldout": ["How is glass blown in a hot shop in Venice?"]}))
    assert played == []
    assert aside == {
        "What is tea?": "another request: empty",
        "What is ink?": "another request: copy_of_evaluation",  # nothing near to what measures gets in
        "What is sand?": "answer to another request: the same as people's response",
        "What is wax?": "answer to another request: empty",
    }


def test_a_text_that_was_cut_or_has_no_room_is_no_request():
    class Cut(Model):
        def generate(self, requests):
            for number, request in enumerate(requests):
                yield Completion(request.id, 0, "Something", 3, ("length", "too_long", "failed", "stop")[number])

    played, aside = made(Cut())
    assert [m.prompt for m in played] == []
    assert list(aside.values()) == [
        "another request: truncated",
        "another request: prompt_too_long",
        "another request: no_answer",
        "answer to another request: truncated",
    ]


MATCHES = [Match(f"p{n}", f"Question {n}?", f"a{n}", f"good {n}", f"b{n}", f"bad {n}") for n in range(3)]


def first(asked):
    return asked.split("Response A:")[1].split("Response B:")[0].split()[1]


def judged(says, passes=2):
    return self_taught.judge(MATCHES, Model(says=says), HOW, passes=passes, model="S", seed=1)  # pyright: ignore


def test_the_right_ones_are_taken_one_an_order_and_all_is_counted():
    """A judge that always says A: right where the better one is shown first, in both passes."""
    rows, drops = judged(lambda asked, index: f"Pass {index}.\nBetter: A" if "Question 2" not in asked else "No idea.")
    found, counts = self_taught.right(MATCHES, rows)
    assert [(trace.match.prompt_id, trace.order, trace.text) for trace in found] == [
        ("p0", "ab", "Pass 0.\nBetter: A"),
        ("p1", "ab", "Pass 0.\nBetter: A"),
    ]
    assert counts == {
        "judgments": 12, "readable": 8, "right": 4, "orders_right": 2, "unreadable: none_named": 4,
    }  # fmt: skip
    assert drops.num_rows == 0
    assert self_taught.balanced(found) == []  # it is no better than its habit: nothing is learnt of it
    assert {row["form"] for row in rows.to_pylist()} == {"pairwise"}


def test_a_later_pass_that_is_right_is_taken_and_its_verdict_is_spelled_as_it_is_asked_for():
    def says(asked, index):
        right = "A" if first(asked) == "good" else "B"
        return f"Why: {right}\n\n **Better: {right}** for sure" if index else "Hm.\nBetter: A or B"

    rows, _ = judged(says)
    found, counts = self_taught.right(MATCHES, rows)
    assert [trace.text for trace in found] == [f"Why: {side}\nBetter: {side}" for side in ("A", "B")] * 3
    assert (counts["unreadable: both_named"], counts["orders_right"]) == (6, 6)
    assert self_taught.balanced(found) == found


def test_a_question_that_does_not_fit_is_dropped():
    rows, drops = judged(lambda asked, index: Completion("x", index, "", 0, "too_long"))
    assert rows.num_rows == 0
    rows, drops = self_taught.judge(MATCHES, TooLong(), HOW, passes=2, model="S", seed=1)  # pyright: ignore
    assert rows.num_rows == 0
    assert drops["reason"].to_pylist() == ["judge_prompt_too_long"] * 6


class TooLong:
    def generate(self, requests):
        for request in requests:
            yield Completion(request.id, 0, "", 0, "too_long")


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(comparisons.PLACES)), unique=True, max_size=60))
def test_st2_a_and_b_are_right_equally_often(places):
    traces = [
        self_taught.Trace(Match("p", "q", f"a{n}", "good", f"b{n}", "bad"), order, f"{n}{order}") for n, order in places
    ]
    kept = self_taught.balanced(traces)
    of_side, before = (Counter(trace.side for trace in found) for found in (kept, traces))
    assert of_side["A"] == of_side["B"] == min(before["A"], before["B"])  # within 1 %, and all of the rarer side stay
    assert [trace for trace in traces if trace in kept] == kept
    assert set(self_taught.balanced(list(reversed(traces)))) == set(kept)


def test_the_verdict_alone_is_taught_in_both_orders():
    rows = self_taught.examples(self_taught.bare(MATCHES[:1]), justified=False).to_pylist()
    assert [row["completion"][0]["content"] for row in rows] == ["Better: A", "Better: B"]
    asked = []

    class Asked:
        def token_scores(self, requests, choices):
            asked.extend(request.messages for request in requests)
            return iter(())

    comparisons.compare(MATCHES[:1], Asked(), judge_name="M1")  # pyright: ignore
    assert [tuple(row["prompt"]) for row in rows] == asked  # word for word as the loop and the order check ask


def test_an_explanation_is_taught_as_it_is_asked_for_and_what_follows_it_is_where_the_verdict_is_read():
    rows = self_taught.examples([self_taught.Trace(MATCHES[0], "ab", "Why.\nBetter: A")], justified=True).to_pylist()
    config = recipes.load("sppo", "smoke", ["judgments.comparisons_justified=true"])

    class Explains(Model):
        def token_scores(self, requests, choices):
            self.read = list(requests)
            return iter(())

    judge = Explains(says=lambda asked, index: "Why.\n")
    comparisons.compare(MATCHES[:1], judge, judge_name="M1", **comparisons.as_asked(config))  # pyright: ignore
    assert rows[0]["prompt"][0]["content"] == judge.asked[0]
    assert rows[0]["completion"][0]["content"].startswith(judge.read[0].prefix)


# --- in a campaign --------------------------------------------------------------------------------------------------

BARE = ("seed_data.eft_targets=self_taught", "seed_data.eft_form=score", "seed_data.eft_groups=null")
TRACES = (
    "seed_data.eft_targets=self_taught", "seed_data.eft_form=justified", "judgments.comparisons_justified=true",
    "seed_data.eft_groups=null", "seed_data.eft_passes=6",
)  # fmt: skip


def taught(folder):
    return store.read_part(folder / "bootstrap" / "eft.parquet").to_pylist()


def counted(folder):
    return json.loads((folder / "bootstrap" / "eft.json").read_text())


def test_a_method_that_compares_is_taught_to(scripted):
    folder = scripted(*BARE, "iterations=1", recipe="sppo")
    told, rows = counted(folder), taught(folder)
    assert told["taught"] == len(rows) == 2 * told["pairs"] > 0
    assert told["instructions"] == 24
    assert Counter(row["completion"][0]["content"] for row in rows) == {
        "Better: A": told["pairs"], "Better: B": told["pairs"],
    }  # fmt: skip
    assert not list(store.parts(folder / "bootstrap" / "judgments"))
    models = folder / "models"
    assert store.read_json(models / "M1" / "complete.json") != store.read_json(
        models / "sft_baseline" / "complete.json"
    )
    report.write_report(folder)
    assert "M1 learns" in (folder / "report" / "report.md").read_text()


@pytest.mark.parametrize(("recipe", "sets"), [("scir", ()), ("dno", ("dno.judge_by=win_rate", "prompts.target=6"))])
def test_others_that_compare_are_taught_to_as_well(scripted, recipe, sets):
    folder = scripted(*BARE, *sets, "iterations=0", "evaluation.models=none", recipe=recipe)
    assert counted(folder)["taught"] == len(taught(folder)) > 0


def test_traces_that_are_right_are_taught_and_the_judge_explains_from_then_on(scripted):
    folder = scripted(*TRACES, "iterations=1", recipe="sppo")
    told, rows = counted(folder), taught(folder)
    judged = [
        row for path in store.parts(folder / "bootstrap" / "judgments") for row in store.read_part(path).to_pylist()
    ]
    assert told["judgments"] == len(judged) == told["pairs"] * 2 * 6
    assert told["readable"] == sum(row["verdict"] is not None for row in judged) < len(judged)
    assert told["orders_right"] == told["taught"] + told["one_sided"]
    said = Counter(row["completion"][0]["content"].splitlines()[-1] for row in rows)
    assert said["Better: A"] == said["Better: B"] == len(rows) / 2 > 0
    assert all(len(row["completion"][0]["content"].splitlines()) == 2 for row in rows)
    (compared, *_) = store.iter_rows(folder / "iter_01" / "comparisons")
    assert len(compared["text"].splitlines()) == 2  # an explanation, and the verdict below it
    assert compared["rubric"] == comparisons.pairwise(justified=True).identity
    report.write_report(folder)
    assert "verdicts; a share of" in (folder / "report" / "report.md").read_text()


def test_an_ift_of_one_row(scripted, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"instruction": "Say what a tide is.", "response": "Water that rises."}) + "\n")
    sets = ("seed=1", "iterations=0", "evaluation.models=none", f"seed_data.ift={json.dumps(str(file))}")
    folder = scripted(*BARE, *sets, recipe="sppo", name="bare")
    assert [row["completion"][0]["content"] for row in taught(folder)] == ["Better: A", "Better: B"]
    with pytest.raises(NothingLeft, match=r"instructions 1, .*one_sided [01], taught 0"):  # one order: a habit
        scripted(*TRACES, *sets, "seed_data.eft_passes=1", recipe="sppo", name="traces")


def test_a_campaign_stopped_on_the_way_goes_on_where_it_was(scripted, tmp_path):
    sets = (*TRACES, "iterations=0", "evaluation.models=none")
    whole = taught(scripted(*sets, recipe="sppo", name="whole"))

    class Stopped(Exception):
        pass

    made: list[bool] = []

    def watch(what, details, stop_after=None):
        if what == "part" and details["stage"] == "judgments":
            made.append(details["reused"])
            if len(made) == stop_after:
                raise Stopped

    with pytest.raises(Stopped):
        scripted(*sets, recipe="sppo", observers=[partial(watch, stop_after=5)])
    folder = tmp_path / "c" / "bootstrap"
    present = [path for name in ("modified", "answers", "judgments") for path in store.parts(folder / name)]
    present.pop().unlink()  # others were under way and may all have been finished
    made.clear()
    assert taught(scripted(*sets, recipe="sppo", observers=[watch])) == whole
    assert made.count(True) == len(present) >= 4
    assert made.count(False) >= 1
    made.clear()
    scripted(*sets, recipe="sppo", observers=[watch])
    assert set(made) == {True}


def test_other_targets_leave_nothing_of_it_behind(scripted):
    sets = ("iterations=0", "evaluation.models=none", "method=scir", "training.dpo.loss=scir")
    folder = scripted(*TRACES[:1], *TRACES[3:], "seed_data.eft_form=score", *sets, recipe="scir") / "bootstrap"
    assert list(store.parts(folder / "modified"))
    scripted(*sets, recipe="scir")
    assert not (folder / "eft.json").exists()
    assert not [path for name in ("modified", "answers", "judgments") for path in store.parts(folder / name)]


def test_requests_that_cannot_be_used_end_with_what_to_do(scripted):
    def says(text: str):
        return text.split("Request:\n<request>\n")[1].split("\n</request>")[0] if "another request" in text else "Well."

    annotator = Annotator(says)
    with annotator.serving() as name:
        sets = (*BARE, "iterations=0", "evaluation.models=none", f"seed_data.eft_endpoint={json.dumps(name)}")
        with pytest.raises(
            NothingLeft,
            match=r"got none \(instructions 24, modified 0, .*same as the instruction: 24\)\. Let a stronger",
        ):
            scripted(*sets, recipe="sppo")


def test_verdicts_that_are_never_right_end_with_what_to_do(scripted):
    def says(text: str):
        return "It is so.\nBetter: A" if "Response A:" in text else f"Another one, of {len(text)} letters."

    annotator = Annotator(says)
    with annotator.serving() as name:
        sets = (*TRACES, "iterations=0", "evaluation.models=none", f"seed_data.eft_endpoint={json.dumps(name)}")
        with pytest.raises(NothingLeft, match=r"one_sided 24, taught 0\)\. Teach the verdict alone .*eft_form=score"):
            scripted(*sets, "seed_data.eft_passes=1", recipe="sppo")


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        ("self_rewarding", BARE, r"eft_targets=self_taught .*method=self_rewarding does not"),
        ("dno", BARE, r"eft_targets=self_taught .*method=dno does not.*dno\.judge_by=win_rate"),
        ("rlaif", BARE, r"eft_targets=self_taught .*method=rlaif does not"),
        ("spin", BARE, r"eft_targets=self_taught .*method=spin does not"),
        ("sppo", TRACES[:2], r"eft_form=justified .*judgments\.comparisons_justified=false asks it otherwise"),
        ("sppo", (*BARE, TRACES[2]), r"eft_form=score .*judgments\.comparisons_justified=true asks it otherwise"),
        ("scir", TRACES, r"training\.dpo\.loss=scir asks .*judgments\.comparisons_justified=true"),
        ("sppo", BARE, None),
        ("sppo", TRACES, None),
    ],
)
def test_what_does_not_compare_is_not_taught_to(recipe, sets, said, tmp_path):
    config = recipes.load(recipe, "smoke", list(sets))
    if said is None:
        resolve(config)
        lines = {line.what: line for line in planned(config, tmp_path, Cluster())}
        passes = 6 if config.seed_data.eft_form == "justified" else 0
        assert lines["texts for EFT"].value == 2 * 48 * (1 + passes)
        return
    for refusing in (resolve, lambda config: planned(config, tmp_path, Cluster())):
        with pytest.raises(ConfigError, match=said):
            refusing(config)


def test_off_it_is_in_no_fingerprint():
    config = RunConfig()
    assert comparisons.texts(config) == [comparisons.pairwise().identity]
    template = comparisons.pairwise().template
    assert template.endswith("Which response is better? Reply with one line only: Better: A or Better: B")
    assert schemas.BETTER_LINE == "Better: "
    assert settings.stage_of("judgments.comparisons_justified") == "judgments"
