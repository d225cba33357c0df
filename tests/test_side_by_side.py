"""All answers to a prompt on one page, with who won."""

from srlm_core import side_by_side, store
from srlm_core.report import write_report


def test_every_model_answers_beside_the_others_and_the_results_are_the_judges(scripted):
    folder = scripted("iterations=1", "evaluation.prompts=6", 'evaluation.head_to_head=["chain"]')
    told = side_by_side.stories(folder)
    assert told["models"] == ["M0", "sft_baseline", "M1", "M2"]
    assert told["total"] == len(told["prompts"]) == 6
    tally = store.read_json(folder / "evaluation/head_to_head/results.json")["comparisons"]["M2_vs_M1"]
    said = [one["matches"] for one in told["prompts"]]
    for word, key in (("wins", "win"), ("ties", "tie"), ("loses", "lose")):
        assert said.count([f"M2 {word} against M1"]) == round(6 * tally[key]["value"])
    asked = store.read_part(folder / "evaluation" / "prompts.parquet")["messages"].to_pylist()
    assert [one["prompt"] for one in told["prompts"]] == [messages[0]["content"] for messages in asked]


def test_the_page_is_static_and_what_models_wrote_is_escaped(scripted, monkeypatch):
    folder = scripted("iterations=0", "evaluation.prompts=2")
    real = side_by_side.answers

    def hostile(*args):
        return {key: row | {"response": "<script>alert(1)</script>"} for key, row in real(*args).items()}

    monkeypatch.setattr(side_by_side, "answers", hostile)
    page = write_report(folder)
    text = (page.parent / "side_by_side.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert 'href="side_by_side.html"' in page.read_text()


def test_where_nothing_is_measured_there_is_no_page(scripted):
    page = write_report(scripted("iterations=0", "evaluation.models=none"))
    assert not (page.parent / "side_by_side.html").exists()
    assert "side_by_side" not in page.read_text()
