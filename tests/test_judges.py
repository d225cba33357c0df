"""Several judges of one campaign's head-to-heads, one of them an endpoint."""

import json

from suites.annotator import Annotator

from srlm_core import store


def test_further_judges_say_how_far_they_agree_and_a_model_that_judges_itself_is_named(scripted):
    first_shown = Annotator(lambda text: {"A": -0.1, "B": -2.3})
    with first_shown.serving() as name:
        sets = ("iterations=1", 'evaluation.head_to_head=["chain","M0"]')
        folder = scripted(*sets, f"evaluation.more_judges={json.dumps([name, 'base'])}")
        found = store.read_json(folder / "evaluation/head_to_head/results.json")
        asked = len(first_shown.asked)
        scripted(*sets, f"evaluation.more_judges={json.dumps([name, 'base'])}")
        assert len(first_shown.asked) == asked == 2 * 3 * 8
    assert found["plays_itself"] == ["M0"]
    endpoint, base = found["other_judges"]
    assert (endpoint["judge"], endpoint["plays_itself"], base["judge"]) == (name, [], "M0")
    # who always takes what is shown first gives ties alone; the first judge once more agrees with itself
    for pair, tally in endpoint["comparisons"].items():
        assert tally["tie"]["value"] == 1
        assert tally["agreement"]["kappa"] is None
        assert base["comparisons"][pair]["agreement"]["same"]["value"] == 1


def test_the_report_shows_every_judge(scripted):
    from srlm_core.report import write_report

    folder = scripted("iterations=1", 'evaluation.head_to_head=["chain","M0"]', 'evaluation.more_judges=["base"]')
    write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "which is itself a player (M0): read its matches with care" in page
    assert "| M2 against M1 | M0 |" in page
