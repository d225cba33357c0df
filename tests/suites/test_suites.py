"""Published benchmarks: read as published, answered in turns, judged over HTTP, counted by hand."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from suites import published
from suites.annotator import Annotator

from srlm_core import schemas, store, suites, winrate
from srlm_core.config import SamplingConfig, SuitesConfig
from srlm_core.engines.protocol import Completion
from srlm_core.errors import DataError, SrlmError
from srlm_core.report import write_report
from srlm_core.suites import alpaca_eval, arena_hard, mt_bench, record
from srlm_core.suites.record import Item


class Repeats:
    """An engine that answers with how many messages it saw, and the temperature; too long above a limit."""

    def __init__(self, limit: int = 100):
        self.limit, self.asked = limit, []

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            n = len(request.messages)
            reason = "too_long" if n > self.limit else "stop"
            text = "" if reason == "too_long" else f"{n} at {request.sampling.temperature}"
            yield Completion(request.id, 0, text, 3, reason)


USUAL = SamplingConfig(temperature=0.7, top_p=1.0, max_tokens=10)


def answers(items: list[Item], texts: dict[str, list[str]]) -> pa.Table:
    """Answers by item's name, as rows of RESPONSES."""
    rows = [
        {"response_id": f"{item.item_id}.{turn}", "prompt_id": item.prompt_id, "iteration": 0, "index": turn,
         "response": text, "n_tokens": 1, "finish_reason": "stop", "source": "policy", "model": "m", "seed": 0}
        for item in items for turn, text in enumerate(texts.get(item.item_id, []))
    ]  # fmt: skip
    return schemas.table(rows, schemas.RESPONSES)


def verdicts(items: list[Item], said: dict[str, list[float | None]]) -> pa.Table:
    """Verdicts by item's name, a null unreadable, as rows of JUDGMENTS."""
    rows = [
        {"judgment_id": f"{item.item_id}/{place}", "target_id": item.item_id, "other_id": None, "first": None,
         "prompt_id": item.prompt_id, "iteration": 0, "index": place, "form": "pointwise", "reading": "text",
         "judge": "j", "rubric": "r", "text": "", "verdict": value,
         "unreadable_reason": "no_verdict" if value is None else None, "finish_reason": "stop", "seed": 0}
        for item in items for place, value in enumerate(said.get(item.item_id, []))
    ]  # fmt: skip
    return schemas.table(rows, schemas.JUDGMENTS)


# --- reading and answering ------------------------------------------------------------------------------------------


def test_the_published_forms_are_read(tmp_path):
    config = SuitesConfig(
        alpaca_eval=str(published.alpaca_eval(tmp_path)), mt_bench=str(published.mt_bench(tmp_path)),
        arena_hard=str(published.arena_hard(tmp_path)), ifeval=str(published.ifeval(tmp_path)), questions=2,
    )  # fmt: skip
    taken = suites.load(config)
    assert {name: (len(one.items), len(one.everything)) for name, one in taken.items()} == {
        "alpaca_eval": (2, 6), "arena_hard": (2, 3), "ifeval": (2, 3), "mt_bench": (2, 6)
    }  # fmt: skip
    writing, maths = taken["mt_bench"].items
    assert (writing.category, writing.temperature, writing.references) == ("writing", 0.7, ())
    assert (maths.category, maths.temperature) == ("math", 0.0)
    assert maths.references == ("The grey one.", "The grey one, hear, is heavier.")
    assert [item.references for item in arena_hard.read(config.arena_hard)] == [(f"Baseline {i}.",) for i in range(3)]
    assert suites.load(config.model_copy(update={"questions": 3}))["ifeval"].identity != taken["ifeval"].identity


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("alpaca_eval", [{"instruction": "no output"}], "expected rows with instruction, output"),
        ("ifeval", [{"prompt": "?"}], "row 1 has no instruction_id_list"),
        ("mt_bench", [{"question_id": 1, "turns": []}], "row 1 has no category, turns"),
    ],
)
def test_a_file_of_another_kind_is_an_error_that_says_what_was_expected(tmp_path, name, content, expected):
    path = published.lines(tmp_path / "file.jsonl", content)
    with pytest.raises(DataError, match=expected):
        suites.load(SuitesConfig(**{name: str(path)}))


def test_arena_hard_wants_one_baseline(tmp_path):
    folder = published.arena_hard(tmp_path)
    published.lines(folder / "model_answer" / "another.jsonl", [{"uid": "u0"}])
    with pytest.raises(
        DataError, match=r"got another.jsonl, baseline-model.jsonl\. Put the baseline's file there alone"
    ):
        arena_hard.read(str(folder))


def test_a_second_turn_is_asked_after_the_first_answer(tmp_path):
    items = mt_bench.read(str(published.mt_bench(tmp_path)))
    engine = Repeats()
    rows, drops = record.answer(items, engine, USUAL, model="m", seed=0)
    assert [(row["index"], row["response"]) for row in rows.to_pylist()] == [
        (0, "1 at 0.7"), (1, "3 at 0.7"), (0, "1 at 0.0"), (1, "3 at 0.0"), (0, "1 at 0.1"), (1, "3 at 0.1")
    ]  # fmt: skip
    second = next(request for request in engine.asked if len(request.messages) == 3)
    assert [message["content"] for message in second.messages] == [items[0].turns[0], "1 at 0.7", items[0].turns[1]]
    assert drops.num_rows == 0
    assert len({request.seed for request in engine.asked}) == len(engine.asked)


def test_a_conversation_that_no_longer_fits_is_dropped_with_its_turn(tmp_path):
    items = mt_bench.read(str(published.mt_bench(tmp_path)))
    rows, drops = record.answer(items, Repeats(limit=2), USUAL, model="m", seed=0)
    assert rows["index"].to_pylist() == [0, 0, 0]
    assert {(row["reason"], row["detail"]) for row in drops.to_pylist()} == {("prompt_too_long", "turn 2")}


# --- verdicts and figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ended", "value", "why"),
    [
        ("Fine.\n[[7]]", "stop", 7, None),
        ("Not [[3]] but [[ 8.5 ]]", "stop", 8.5, None),
        ("[[9/10]]", "stop", 9, None),
        ("[[11]]", "stop", None, "out_of_range"),
        ("[[-1]]", "stop", None, "out_of_range"),
        ("A 7, I think.", "stop", None, "no_score_line"),
        ("As you said, [[2]] is", "length", None, "truncated"),
        ("", "failed", None, "no_answer"),
    ],
)
def test_a_grade_is_read_or_null(text, ended, value, why):
    assert mt_bench.grade(text, ended) == (value, why)


def test_mt_bench_worked_by_hand(tmp_path):
    items = [Item("a", ("x", "y"), "math"), Item("b", ("x", "y"), "math"), Item("c", ("z", "y"), "stem")]
    found = mt_bench.measure(
        items, answers(items, {}), verdicts(items, {"a": [8, 6], "b": [4, None], "c": [None, None]})
    )
    # a is 7, b is 4; c could not be read and counts for nothing
    assert found["score"] == {"value": 5.5, "stderr": pytest.approx(1.5 / 2**0.5), "n": 2}
    assert (found["turn_1"]["value"], found["turn_2"]["value"]) == (6, 6)
    assert found["readable_rate"]["value"] == 0.5
    assert found["categories"] == {"math": found["score"]}


@pytest.mark.parametrize(
    ("text", "for_first"),
    [("[[A>>B]]", 4), ("[[A>B]]", 3), ("[[A=B]]", 2), ("[[B>A]]", 1), ("[[B>>A]]", 0), ("[[B<<A]]", 4), ("[[A<B]]", 1),
     ("first [[A>B]], on reflection [[ B >> A ]]", 0), ("[[A>A]]", None), ("A>B", None), ("[[A>>>B]]", None)],
)  # fmt: skip
def test_a_verdict_of_five_levels_is_read_from_both_sides(text, for_first):
    assert arena_hard.for_first(text, "stop").value == for_first
    assert arena_hard.for_second(text, "stop").value == (None if for_first is None else 4 - for_first)


def test_arena_hard_worked_by_hand():
    items = [Item(name, (name,)) for name in "abc"]
    found = arena_hard.measure(items, answers(items, {}), verdicts(items, {"a": [4, 1], "b": [2, 2], "c": [3, None]}))
    # a: a strong win counts three times, so 3 of 4; b: 1 of 2; c: 1 of 1
    assert found["win_rate"]["value"] == pytest.approx(5 / 7)
    assert found["win_rate"]["n"] == 3
    assert found["interval"][0] <= 5 / 7 <= found["interval"][1]
    assert found["readable_rate"]["value"] == pytest.approx(5 / 6)
    assert found["flip_rate"] == {"value": 0.5, "stderr": pytest.approx(0.5 / 2**0.5), "n": 2}


def test_alpaca_eval_gives_what_winrate_gives_on_its_own_annotations(tmp_path):
    items = alpaca_eval.read(str(published.alpaca_eval(tmp_path, 40)))
    said = answers(items, {item.item_id: ["word " * (3 * i % 17 + 1)] for i, item in enumerate(items)})
    judged = verdicts(items, {item.item_id: [(7 * i % 10) / 10] for i, item in enumerate(items)})
    found = alpaca_eval.measure(items, said, judged)
    assert found["win_rate"]["value"] == pytest.approx(0.45)
    files = alpaca_eval.files(items, said, judged, "ours")
    assert files["model_outputs.json"][0].keys() == {"dataset", "instruction", "output", "generator"}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(files["annotations.json"]))
    read = winrate.read(path)
    told = winrate.win_rates(read.verdicts)["ours"]
    assert read.baseline == "the_baseline"
    assert found["win_rate"]["value"] * 100 == pytest.approx(told.win_rate)
    assert found["length_controlled"]["value"] * 100 == pytest.approx(told.length_controlled_win_rate)


# --- a campaign that takes them all, judged over HTTP ---------------------------------------------------------------


def by_kind(text: str):
    """Judge soundness, each benchmark in its own way."""
    if "m or M" in text:
        return {"m": -0.2, "M": -1.7} if text.index("Answer m") < text.find("Sound") < text.index("Answer M") else {
            "M": -0.2, "m": -1.7}  # fmt: skip
    return "Thought about.\n[[A>B]]" if "[[A>B]]" in text else "Thought about.\n[[6]]"


def all_of(folder: Path) -> list[str]:
    where = {name: getattr(published, name)(folder) for name in suites.SUITES}
    return [f"evaluation.suites.{name}={json.dumps(str(path))}" for name, path in where.items()] + [
        "evaluation.suites.sampling.max_tokens=64", "iterations=1", "evaluation.models=policy", "engine.shard_rows=2",
    ]  # fmt: skip


def test_a_campaign_takes_them_once_and_an_annotator_judges_each_answer_once(tmp_path, scripted):
    annotator, sets = Annotator(by_kind), all_of(tmp_path)
    with annotator.serving() as name:
        folder = scripted(*sets, f"evaluation.suites.annotator={json.dumps(name)}")
        # two models; 6 answers, 6 grades of 3 questions in two turns, 3 pairs of games
        assert len(annotator.asked) == 2 * (6 + 6 + 6)
        found = store.read_json(folder / "evaluation" / "M2" / "results.json")["suites"]
        assert found["mt_bench"]["score"] == {"value": 6, "stderr": 0, "n": 3}
        assert found["mt_bench"]["judge"] == name
        # A is always better: each game won is one lost, and every verdict changes with the order
        assert (found["arena_hard"]["win_rate"]["value"], found["arena_hard"]["flip_rate"]["value"]) == (0.5, 1)
        assert found["alpaca_eval"]["win_rate"]["n"] == 6
        assert (
            winrate.read(folder / "evaluation" / "M2" / "alpaca_eval" / "annotations.json").baseline == "the_baseline"
        )
        # each judged benchmark has a line of its own for what could be read
        write_report(folder)
        page = (folder / "report" / "report.md").read_text()
        assert page.count("readable verdicts") == 2
        assert page.count("readable grades") == 1
        scripted(*sets, f"evaluation.suites.annotator={json.dumps(name)}")
        assert len(annotator.asked) == 2 * (6 + 6 + 6)
        # what is lost is asked again, nothing else
        next((folder / "evaluation" / "M1" / "mt_bench_judged").glob("part-00001*")).unlink()
        scripted(*sets, f"evaluation.suites.annotator={json.dumps(name)}")
        assert len(annotator.asked) == 2 * (6 + 6 + 6) + 2


def test_an_endpoint_judges_while_the_next_model_trains(tmp_path, scripted):
    seen: list[str] = []

    def watch(what, details):
        if what == "part" and details["path"].parent.name in [f"{suite}_judged" for suite in suites.SUITES]:
            seen.append(details["path"].parents[1].name)
        if what == "evaluation" and details["model"] == "M2":
            seen.append("M2 is measured")

    annotator = Annotator(by_kind)
    with annotator.serving() as name:
        scripted(*all_of(tmp_path), f"evaluation.suites.annotator={json.dumps(name)}", observers=[watch])
    # three benchmarks in 3 + 2 + 2 parts, found again in the end
    assert seen[: seen.index("M2 is measured")].count("M1") == 3 + 2 + 2
    assert seen.count("M1") == 2 * (3 + 2 + 2)
    assert len(annotator.asked) == 2 * (6 + 6 + 6)


def test_a_campaign_does_not_stop_for_an_endpoint_that_is_away_until_the_end(tmp_path, scripted, told):
    annotator = Annotator(by_kind)
    with annotator.serving() as name:
        pass
    sets = [*all_of(tmp_path), f"evaluation.suites.annotator={json.dumps(name)}"]
    with pytest.raises(SrlmError, match="http"):
        scripted(*sets)
    assert (tmp_path / "c" / "models" / "M2" / "complete.json").exists()
    assert any("the answers of M1 are not all judged yet" in line for line in told)


def test_without_an_annotator_there_are_answers_and_no_verdicts(tmp_path, scripted):
    folder = scripted(*all_of(tmp_path))
    found = store.read_json(folder / "evaluation" / "M2" / "results.json")["suites"]
    assert "win_rate" not in found["alpaca_eval"]
    assert "judge" not in found["mt_bench"]
    assert len(store.read_json(folder / "evaluation" / "M2" / "alpaca_eval" / "model_outputs.json")) == 6


def test_an_annotator_that_is_busy_talks_nonsense_or_breaks_off_is_counted_never_believed(tmp_path, scripted):
    seen: dict[str, int] = {}

    def badly(text: str):
        seen[text] = seen.get(text, 0) + 1
        if seen[text] == 1 and len(seen) % 3 == 0:
            return 429, {"error": {"message": "slow down"}}
        if seen[text] == 1 and len(seen) % 3 == 1:
            return 500, {"error": {"message": "oops"}}
        if "m or M" in text:
            return {"neither": -0.1, "I": -2.0}
        if "[[A>B]]" in text:
            return (200, '{"choices": [') if "number 0" in text else "Both are nice."
        return (
            "On a scale from [[1]] to […"
            if "writing" in text
            else (200, {"choices": []})
            if "math" in text
            else "[[6]]"
        )

    annotator = Annotator(badly)
    with annotator.serving() as name:
        folder = scripted(*all_of(tmp_path), f"evaluation.suites.annotator={json.dumps(name)}", "iterations=0")
    found = store.read_json(folder / "evaluation" / "M1" / "results.json")["suites"]
    assert found["alpaca_eval"]["win_rate"]["value"] is None
    assert found["arena_hard"]["win_rate"]["value"] is None
    assert found["mt_bench"]["score"] == {"value": 6, "stderr": None, "n": 1}
    assert found["mt_bench"]["readable_rate"]["value"] == pytest.approx(2 / 6)
    why = pa.concat_tables(
        store.read_part(path)
        for name in suites.SUITES
        for path in store.parts(folder / "evaluation/M1" / f"{name}_judged")
    )["unreadable_reason"].to_pylist()
    assert {reason: why.count(reason) for reason in set(why) - {None}} == {
        "no_answer": 6 + 2 + 2, "no_verdict": 4, "truncated": 2
    }  # fmt: skip


def test_a_model_measured_under_other_settings_is_not_judged_under_these(tmp_path, scripted):
    sets, annotator = all_of(tmp_path), Annotator(by_kind)
    scripted(*sets, "evaluation.models=all", "evaluation.suites.questions=3")
    with annotator.serving() as name:
        new = (f"evaluation.suites.annotator={json.dumps(name)}", "evaluation.suites.questions=1")
        folder = scripted(*sets, *new)
    assert store.read_json(folder / "evaluation/M2/results.json")["suites"]["mt_bench"]["score"]["n"] == 1
    assert "judge" not in store.read_json(folder / "evaluation/M0/results.json")["suites"]["mt_bench"]
    # two models; an answer, two grades, a pair of games
    assert len(annotator.asked) == 2 * (1 + 2 + 2)


def test_what_a_benchmark_asks_is_kept_out_of_training(tmp_path, scripted):
    asked = json.loads((published.mt_bench(tmp_path) / "question.jsonl").read_text().splitlines()[0])["turns"][0]
    rows = [{"instruction": asked.upper(), "response": "It is the grey one."}]
    rows += [{"instruction": f"Describe the harbour of town {i} at dawn.", "response": "Grey."} for i in range(5)]
    ift = published.lines(tmp_path / "ift.jsonl", rows)
    folder = scripted(*all_of(tmp_path), f"seed_data.ift={json.dumps(str(ift))}", "iterations=0")
    aside = store.read_json(folder / "bootstrap" / "set_aside" / "ift.json")
    assert [row["text"] for row in aside] == [asked.upper()]
    assert "a prompt that measures (mt_bench)" in aside[0]["reason"]
