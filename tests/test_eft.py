import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import eft, recipes
from srlm_core.errors import ConfigError, DataError
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


def test_ranks_need_the_form_of_scores_and_a_split_needs_enough(tmp_path):
    with pytest.raises(ConfigError, match="eft_form=score"):
        recipes.load("smoke", overrides=["seed_data.eft_targets=ranked"])
    file = ranked_file(tmp_path, 1)
    wanted = [f"seed_data.eft={file}", "seed_data.eft_targets=ranked", "seed_data.eft_form=score"]
    with pytest.raises(DataError, match="for both parts"):
        load_seed(recipes.load("smoke", overrides=[*wanted, "seed_data.heldout=split"]))
    instructions = write(
        tmp_path / "i.jsonl", [{"instruction": "Word0a word0b word0c word0d word0e!", "response": "A thing."}]
    )
    with pytest.raises(DataError, match="whose prompts IFT does not teach, got 1"):
        load_seed(recipes.load("smoke", overrides=[*wanted, f"seed_data.ift={instructions}"]))
