"""Campaigns against one another."""

import json
import math
import shutil

import made_up
import pytest

from srlm_core import comparison, store, summary


@pytest.fixture
def two(scripted):
    return [scripted("iterations=1", name="a"), scripted("iterations=1", "pairs.min_margin=1", name="b")]


def read(page):
    return (page.parent / "comparison.md").read_text()


def test_every_difference_has_the_error_of_both(two, tmp_path):
    campaigns = {folder.name: summary.collect(folder) for folder in two}
    lines = {line["measure"]: line for line in comparison.differences(campaigns)[-1]["lines"]}
    sides = [store.read_json(folder / "evaluation/M2/results.json")["judge"]["pairwise_accuracy"] for folder in two]
    error = math.hypot(*(side["stderr"] for side in sides))
    gap = sides[1]["value"] - sides[0]["value"]
    told = lines["pairwise accuracy"]
    assert told["gap"].replace("−", "-").lstrip("+-") == f"{gap:+.2f} ± {error:.2f}".lstrip("+-")
    assert bool(told["apart"]) == (abs(gap) > 2 * error)


def test_a_campaign_differs_in_nothing_from_its_copy(scripted, tmp_path):
    a = scripted("iterations=1", name="a")
    b = shutil.copytree(a, tmp_path / "b")
    campaigns = {folder.name: summary.collect(folder) for folder in (a, b)}
    assert comparison.other_settings(campaigns) == []
    assert comparison.differences(campaigns)
    for of in comparison.differences(campaigns):
        assert all(line["gap"].startswith("0.00") and not line["apart"] for line in of["lines"])
    page = comparison.write_comparison([a, b], tmp_path / "page")
    assert "which the errors do not tell from none" in read(page)
    assert "beyond two errors |" not in read(page)


def test_a_page_names_the_settings_that_differ_and_shows_answers_to_the_same_prompts(two, tmp_path):
    page = comparison.write_comparison(two, tmp_path / "page")
    assert "| pairs\\.min\\_margin | 0\\.0 | 1\\.0 |" in read(page)
    assert "prompts\\.target" not in read(page)
    assert {path.stem for path in (page.parent / "figures").iterdir()} == {"judge_accuracy", "length", "wins"}
    shown = page.read_text()
    assert "a/M2" in shown
    assert "8 of 8 evaluation prompts" in shown
    assert shown == comparison.write_comparison(two, tmp_path / "page").read_text()


def test_what_was_not_measured_alike_is_said(scripted, tmp_path):
    a = scripted("iterations=1", name="a")
    b = scripted("iterations=1", "evaluation.prompts=5", "evaluation.heldout_groups=3", name="b")
    told = comparison.caveats([a, b], {folder.name: summary.collect(folder) for folder in (a, b)})
    assert any("same evaluation prompts" in line for line in told)
    assert any("same held-out rankings" in line for line in told)
    assert not any("judge of the head-to-heads" in line for line in told)


def test_campaigns_named_alike_are_told_apart_and_one_given_twice_is_one(tmp_path):
    folders = [made_up.campaign(tmp_path / where) for where in ("x", "y")]
    assert len(set(comparison.names(folders))) == 2
    page = comparison.write_comparison([folders[0], folders[0]], tmp_path / "page")
    assert "there is nothing to compare yet" in read(page)


def test_a_campaign_that_has_not_begun_is_no_obstacle(two, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    store.write_json(empty / "config.json", json.loads((two[0] / "config.json").read_text()))
    page = comparison.write_comparison([two[0], empty], tmp_path / "page")
    assert "empty is not finished" in read(page)
