import json
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from suites.annotator import Annotator

from srlm_core import eft, recipes, store
from srlm_core.errors import ConfigError, DataError, NothingLeft
from srlm_core.schemas import prompt_text
from srlm_core.seed_data import load_seed
from srlm_core.store import read_part


def group(prompt, *ranks):
    return {"prompt": prompt, "responses": [{"text": f"{prompt} {n}", "rank": r} for n, r in enumerate(ranks)]}


@pytest.mark.parametrize(
    ("ranks", "scores"),
    [
        ((0, 1), (5, 0)),
        ((0, 1, 2), (5, 3, 0)),  # 2.5 goes up
        ((2, 0, 1, 3), (2, 5, 3, 0)),  # 5 (1 - 2/3) = 1.67, 5 (1 - 1/3) = 3.33
        ((0, 1, 1), (5, 0, 0)),
        ((0, 0, 2), (5, 5, 0)),
    ],
)
def test_the_points_of_ranks(ranks, scores):
    (found,) = eft.scored([group("p", *ranks)])
    assert tuple(response["score"] for response in found["responses"]) == scores


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30, unique=True), st.floats(0.1, 0.9))
def test_a_split_loses_nothing_and_a_conversation_stays_on_one_side(prompts, share):
    groups = [{**group(f"{text} more", 0, 1), "turns": [text, "more"]} for text in prompts]
    groups += [group(text, 0, 1) for text in prompts]
    training, measuring = eft.split(groups, share)
    assert len(training) + len(measuring) == len(groups)
    opened = [{(g.get("turns") or [g["prompt"]])[0] for g in side} for side in (training, measuring)]
    assert opened[0].isdisjoint(opened[1])


def test_a_split_takes_about_its_share():
    _, measuring = eft.split([group(f"p{n}", 0, 1) for n in range(1000)], 0.25)
    assert 200 < len(measuring) < 300


def test_no_score_is_more_than_twice_as_common_as_the_median_one():
    groups = eft.scored([group(f"p{n}", 0, 1) for n in range(4)] + [group("q", 0, 1, 2, 3)] + [group("r", 0, 1, 2)])
    # 5 and 0: six times each, 3: twice, 2: once; the median of 6, 6, 2, 1 is 4, so 8 may stay: nothing goes
    assert eft.thinned(groups) == (groups, [])
    many = groups + eft.scored([group(f"s{n}", 0, 0, 0, 1) for n in range(4)])
    # 5: 6 + 12 = 18, 0: 10, 3: 2, 2: 1; the median is 6, so 12 may stay: six 5s go
    kept, out = eft.thinned(many)
    assert Counter(r["score"] for g in kept for r in g["responses"]) == {5: 12, 0: 10, 3: 2, 2: 1}
    assert [r["score"] for _, r in out] == [5] * 6
    assert eft.thinned([]) == ([], [])


def test_a_prompt_that_teaches_answering_does_not_teach_judging():
    groups = [group("What is tea?", 0, 1), group("What is ink?", 0, 1)]
    apart, taught = eft.apart_from(groups, [{"instruction": "what is TEA", "response": "A drink."}])
    assert (apart, taught) == ([groups[1]], [groups[0]])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return json.dumps(str(path))


def ranked_file(tmp_path, n=24):
    asked = [" ".join(f"word{n}{letter}" for letter in "abcde") for n in range(n)]
    return write(tmp_path / "ranked.jsonl", [group(text, 0, 1, 2) for text in asked])


def test_a_campaign_learns_judging_from_human_ranks_and_is_measured_on_others(scripted, tmp_path):
    file = ranked_file(tmp_path)
    wanted = (f"seed_data.eft={file}", "seed_data.eft_targets=ranked", "seed_data.eft_form=score",
              "seed_data.heldout=split", "seed_data.eft_groups=null", "evaluation.heldout_groups=null")  # fmt: skip
    folder = scripted("iterations=0", *wanted)
    rows = read_part(folder / "bootstrap" / "eft.parquet").to_pylist()
    said = Counter(row["completion"][0]["content"] for row in rows)
    assert said.keys() == {"Score: 5", "Score: 3", "Score: 0"}
    config = recipes.load("smoke", overrides=["iterations=0", *wanted])
    seed = load_seed(config)
    measuring = {g["prompt"] for g in seed.heldout}
    assert measuring
    assert measuring.isdisjoint(g["prompt"] for g in seed.eft)
    assert not [row for row in rows if any(prompt in prompt_text(row["prompt"]) for prompt in measuring)]


def test_a_split_needs_enough_and_ift_leaves_some(tmp_path):
    file = ranked_file(tmp_path, 1)
    wanted = [f"seed_data.eft={file}", "seed_data.eft_targets=ranked", "seed_data.eft_form=score"]
    with pytest.raises(DataError, match="for both parts"):
        load_seed(recipes.load("smoke", overrides=[*wanted, "seed_data.heldout=split"]))
    instructions = write(
        tmp_path / "i.jsonl", [{"instruction": "Word0a word0b word0c word0d word0e!", "response": "A thing."}]
    )
    with pytest.raises(DataError, match="whose prompts IFT does not teach, got 1"):
        load_seed(recipes.load("smoke", overrides=[*wanted, f"seed_data.ift={instructions}"]))


def saying(**scores):
    """What a judge said: `p0=[5, None]` = two passes over the response "p 0"."""
    return {
        ("p", f"p {name[1:]}"): [eft.Said(score, f"Because. Score: {score}") for score in passes]
        for name, passes in scores.items()
    }


@pytest.mark.parametrize(
    ("ranks", "scores", "strict", "top"),
    [
        ((0, 1), (4, 2), True, True),
        ((0, 1), (2, 4), False, False),
        ((0, 1), (4, 4), False, False),  # says nothing
        ((0, 1, 2), (4, 4, 3), True, True),  # a tie inverts nothing
        ((0, 1, 2), (5, 2, 3), False, True),  # the best is the best, the others are inverted
        ((0, 0, 1), (1, 5, 1), True, True),  # of two best ones one is enough
        ((0, 1, 2), (None, 4, 2), True, True),  # what cannot be read is left out
        ((0, 1, 2), (None, 2, 4), False, False),
        ((0, 1), (3, None), False, False),
        ((0, 1), (None, None), False, False),
        ((0, 0), (3, 4), False, True),
    ],
)
def test_which_scores_agree_with_a_ranking(ranks, scores, strict, top):
    said = saying(**{f"p{n}": [score] for n, score in enumerate(scores)})
    for agree, expected in (("strict", strict), ("top", top)):
        found = eft.agreeing([group("p", *ranks)], said, agree)
        assert bool(found.groups) == expected
        assert len(found.set_aside) == (not expected)


def test_the_first_pass_that_agrees_is_taken_and_all_is_counted():
    said = saying(p0=[1, 4.5, 5], p1=[2, None, 1], p2=[3, 3, 2])
    found = eft.agreeing([group("p", 0, 1, 2)], said, "strict")
    (taken,) = found.groups
    assert [(r["text"], r["rank"], r["score"], r["judgment"]) for r in taken["responses"]] == [
        ("p 0", 0, 4.5, "Because. Score: 4.5"),
        ("p 2", 2, 3, "Because. Score: 3"),
    ]
    assert found.counts == {
        "groups": 1, "judgments": 9, "readable": 8, "passes": 3, "passes_agreeing": 1, "groups_agreeing": 1,
    }  # fmt: skip


def test_what_was_never_judged_is_set_aside_with_its_reason():
    found = eft.agreeing([group("p", 0, 1), group("q", 0, 1)], saying(p0=[1], p1=[2]), "strict")
    assert [(g["prompt"], why) for g, why in found.set_aside] == [
        ("p", "no pass agrees with the ranking"),
        ("q", "no judgment can be read"),
    ]


def test_a_justification_gets_the_score_of_the_rank():
    said = {("p", "p 0"): [eft.Said(1, "Clear.\n**Score: 1**")], ("p", "p 1"): [eft.Said(None, "No end")]}
    found = eft.justified(eft.scored([group("p", 0, 1)]), said)
    assert [r["judgment"] for g in found.groups for r in g["responses"]] == ["Clear.\nScore: 5"]
    assert [why for _, why in found.set_aside] == ["1 response(s) without a justification"]
    assert found.counts == {"groups": 1, "judgments": 2, "readable": 1}


def judgments_taught(folder):
    rows = read_part(folder / "bootstrap" / "eft.parquet").to_pylist()
    return [row["completion"][0]["content"] for row in rows]


def test_a_model_judges_and_what_agrees_with_people_is_taught(scripted):
    folder = scripted(
        "iterations=0",
        "seed_data.eft_groups=null",
        "seed_data.eft_targets=self",
        "seed_data.eft_passes=4",
        "engine.shard_rows=16",
    )
    told = json.loads((folder / "bootstrap" / "eft.json").read_text())
    assert told["judge"] == "sft_baseline"
    judged = [row for path in store.parts(folder / "bootstrap" / "judgments") for row in read_part(path).to_pylist()]
    assert told["judgments"] == len(judged) > 0
    assert told["readable"] == sum(row["verdict"] is not None for row in judged)
    assert 0 < told["groups_agreeing"] < told["groups"]
    taught = judgments_taught(folder)
    assert set(taught) <= {row["text"].strip() for row in judged}
    aside = json.loads((folder / "bootstrap" / "set_aside" / "eft_judged.json").read_text())
    assert len(aside) == told["groups"] - told["groups_agreeing"] + told["over_common"]


def test_a_campaign_stopped_while_it_judges_goes_on_where_it_was(scripted, tmp_path):
    wanted = ("iterations=0", "seed_data.eft_groups=null", "seed_data.eft_targets=self", "engine.shard_rows=8")
    taught = judgments_taught(scripted(*wanted, name="whole"))

    class Stopped(Exception):
        pass

    made: list[bool] = []

    def watch(what, details, stop_after=None):
        if what == "part" and details["stage"] == "judgments":
            made.append(details["reused"])
            if len(made) == stop_after:
                raise Stopped

    with pytest.raises(Stopped):
        scripted(*wanted, observers=[partial(watch, stop_after=2)])
    present = store.parts(tmp_path / "c" / "bootstrap" / "judgments")
    present[-1].unlink()  # others were under way and may all have been finished
    made.clear()
    folder = scripted(*wanted, observers=[watch])
    assert made.count(True) == len(present) - 1 >= 1
    assert made.count(False) >= 1
    assert judgments_taught(folder) == taught


def test_other_targets_leave_nothing_of_the_judge_behind(scripted):
    folder = scripted("iterations=0", "seed_data.eft_targets=self") / "bootstrap"
    assert (folder / "eft.json").exists()
    assert list((folder / "drops").glob("part-judgments-*"))
    scripted("iterations=0")
    assert not (folder / "eft.json").exists()
    assert not (folder / "set_aside").exists()
    assert not list(store.parts(folder / "judgments"))
    assert not list((folder / "drops").glob("part-judgments-*"))


def test_ranks_score_and_the_model_justifies(scripted):
    folder = scripted("iterations=0", "seed_data.eft_targets=ranked")
    taught = judgments_taught(folder)
    assert taught
    assert {text.splitlines()[-1] for text in taught} <= {f"Score: {n}" for n in range(6)}
    assert all(len(text.splitlines()) > 1 for text in taught)


def test_a_judge_that_never_agrees_ends_with_what_to_do(scripted, tmp_path):
    poor, good = {"text": "Nothing.", "rank": 0}, {"text": "Sound: " * 5, "rank": 1}
    file = write(tmp_path / "g.jsonl", [{"prompt": f"Question {n}?", "responses": [good, poor]} for n in range(3)])
    with pytest.raises(NothingLeft, match=r"got none \(groups 3, judgments 18, .*agreeing 0.*eft_targets=endpoint"):
        scripted("iterations=0", "seed_data.eft_targets=self", f"seed_data.eft={file}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["seed_data.eft_targets=endpoint"], "needs the model that judges"),
        (["seed_data.eft_endpoint=m@http://x/v1"], "for eft_targets=endpoint or ranked"),
        (["seed_data.eft_targets=self", "seed_data.eft_sampling.max_tokens=100000"], "eft_sampling.max_tokens=100000"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        recipes.load("smoke", overrides=settings)


def test_a_stronger_model_judges_over_http_and_is_asked_once(scripted, tmp_path):
    def judged(text: str):
        response = text.rpartition("<response>")[2]
        if "unreadable" in response:
            return 200, {"choices": []}
        return f"It makes {response.count('Sound:')} sound points.\nScore: {response.count('Sound:')}"

    texts = [("Sound: " * 4, 0), ("Sound: ", 1), ("Hollow.", 2)]
    groups = [
        {
            "prompt": f"Question {n} of the harbour?",
            "responses": [{"text": f"{t} In {n}.", "rank": r} for t, r in texts],
        }
        for n in range(3)
    ]
    groups[2]["responses"].append({"text": "unreadable", "rank": 3})
    file = write(tmp_path / "g.jsonl", groups)
    annotator = Annotator(judged)
    with annotator.serving() as name:
        sets = ("iterations=0", "seed_data.eft_targets=endpoint", f"seed_data.eft={file}", "seed_data.eft_passes=1")
        sets += (f"seed_data.eft_endpoint={json.dumps(name)}", "evaluation.models=none")
        folder = scripted(*sets)
        asked = len(annotator.asked)
        assert judgments_taught(scripted(*sets)) == judgments_taught(folder)
        assert len(annotator.asked) == asked
    told = json.loads((folder / "bootstrap" / "eft.json").read_text())
    assert (told["judge"], told["judgments"], told["readable"]) == (name, 10, 9)
    assert told["groups_agreeing"] == 3
    assert "It makes 4 sound points.\nScore: 4" in judgments_taught(folder)
