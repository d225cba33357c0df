"""Blind votes: a page that does not say who wrote what, and counts worked by hand."""

import json
import re

import pytest
from typer.testing import CliRunner

from flows.cli import app
from srlm_core import store, summary, votes
from srlm_core.errors import DataError


@pytest.fixture
def campaign(scripted):
    return scripted("iterations=1", "evaluation.prompts=6", "seed_data.ift_rows=8")


def given(shown, choices, voter="Ada"):
    """A file of votes as the page saves it: what is better, by who wrote it."""
    return {"voter": voter, "votes": [
        {"prompt_id": b.prompt_id, "left": b.left, "right": b.right, "choice": choice}
        for b, choice in zip(shown, choices, strict=False)
    ]}  # fmt: skip


def written_by(folder, model):
    rows = store.read_part(folder / "evaluation" / model / "responses" / "part-00000.parquet").to_pylist()
    return {row["response_id"] for row in rows}


def test_the_page_is_blind_and_holds_every_text_harmlessly(campaign, monkeypatch):
    real = votes.ballots

    def hostile(*args):
        return [b._replace(left_text="</script><script>alert(1)</script>") for b in real(*args)]

    monkeypatch.setattr(votes, "ballots", hostile)
    page = votes.write_page(campaign, "M2", "M1", 50).read_text()
    assert "alert(1)</script>" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["ballots"][0]["left_text"] == "</script><script>alert(1)</script>"
    assert not re.search(r"\bM[12]\b", page)
    assert "http" not in page.replace("http-equiv", "")


def test_both_models_stand_on_both_sides_in_the_same_places_each_time(campaign):
    shown = votes.ballots(campaign, "M2", "M1", 50)
    own = written_by(campaign, "M2")
    assert {b.left in own for b in shown} == {True, False}
    assert all((b.left in own) != (b.right in own) for b in shown)
    assert votes.ballots(campaign, "M2", "M1", 50) == shown
    assert votes.ballots(campaign, "M2", "M1", 2) == shown[:2]


def test_votes_worked_by_hand(campaign):
    shown = votes.ballots(campaign, "M2", "M1", 3)
    own = written_by(campaign, "M2")
    for_newer = ["left" if b.left in own else "right" for b in shown]
    for_older = ["right" if b.left in own else "left" for b in shown]
    people = [
        given(shown, [for_newer[0], for_newer[1], "tie"], "Ada"),
        given(shown, [for_newer[0], for_older[1], for_older[2]], "Ben"),
        given(shown, [for_older[0]], "Cem"),
    ]
    found = votes.count(campaign, people)
    told = found["comparisons"]["M2_vs_M1"]
    # 2 to 1 for the newer one; 1 to 1; a tie and a vote for the older one
    assert [told[key]["value"] for key in ("win", "tie", "lose")] == pytest.approx([1 / 3] * 3)
    assert (told["voters"], told["win_or_half_tie"]["n"]) == (3, 3)
    # Ada and Ben agree on the first of three; Cem with neither
    assert told["two_people_agree"]["value"] == pytest.approx(1 / 5)
    assert told["judge_agrees"]["same"]["n"] == 3


def test_what_is_no_vote_is_set_aside_and_a_second_vote_replaces_the_first(campaign):
    shown = votes.ballots(campaign, "M2", "M1", 2)
    good = given(shown, ["left", "left"])
    bad = [
        "nonsense", {"choice": "left"}, {**good["votes"][0], "choice": "both"},
        {**good["votes"][0], "right": shown[1].right}, {**good["votes"][0], "right": good["votes"][0]["left"]},
    ]  # fmt: skip
    again = given(shown, ["right"])
    found = votes.count(campaign, [{**good, "votes": good["votes"] + bad}, again])
    told = found["comparisons"]["M2_vs_M1"]
    assert told["voters"] == 1
    assert told["win"]["value"] + told["lose"]["value"] == 1
    assert found["set_aside"] == {
        "no choice of left, tie, right": 2, "no answer of this campaign as it is now": 1,
        "no two models' answers to one prompt": 2,
    }  # fmt: skip


def test_from_the_command_line_to_the_report(campaign, tmp_path):
    (campaign / "config.json").write_text("{}")
    root = ["--root", str(campaign.parent)]
    page = CliRunner().invoke(app, ["vote", campaign.name, "M2", "M1", "--prompts", "3", *root])
    assert page.exit_code == 0, page.output
    file = tmp_path / "votes.json"
    file.write_text(json.dumps(given(votes.ballots(campaign, "M2", "M1", 3), ["left", "tie", "right"])))
    for _ in range(2):  # the same file counts once
        told = json.loads(CliRunner().invoke(app, ["votes", campaign.name, str(file), "--json", *root]).stdout)
        assert told["comparisons"]["M2_vs_M1"]["voters"] == 1
    assert len(list((campaign / "evaluation" / "votes").glob("*.json"))) == 2
    assert "Blind votes" in (campaign / "report" / "report.md").read_text()
    assert "votes" not in summary.models(campaign)


def test_errors_say_what_was_expected(campaign, tmp_path):
    with pytest.raises(DataError, match="expected answers of M9"):
        votes.write_page(campaign, "M9", "M1", 5)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(DataError, match=r"expected a file of votes as the page saves it .*got '\[1\]'"):
        votes.read(campaign, [tmp_path / "x.json"])
