"""Offline DPO: one training on what people ranked."""

import json

import pytest

from srlm_core import recipes, store
from srlm_core.backend import resolve
from srlm_core.errors import ConfigError


def groups(path):
    rows = [
        {"prompt": f"Describe colour {i}.", "responses": [
            {"text": f"fair {i}", "rank": 1}, {"text": f"best {i}", "rank": 0}, {"text": f"worst {i}", "rank": 2},
            {"text": f"as bad {i}", "rank": 2},
        ]} for i in range(6)
    ]  # fmt: skip
    rows.append({"prompt": "Which is it?", "responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"seed_data.eft={json.dumps(str(path))}"


def test_best_against_worst_of_each_group_and_no_engine(tmp_path, scripted):
    started = []

    def watch(what, details):
        if what == "engine_start":
            started.append(details["model"])

    sets = (groups(tmp_path / "ranked.jsonl"), "seed_data.eft_groups=null", "evaluation.models=none")
    folder = scripted(*sets, recipe="dpo", observers=[watch])
    pairs = list(store.iter_rows(folder / "iter_01" / "pairs"))
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [(f"best {i}", f"worst {i}") for i in range(6)]
    (aside,) = store.read_json(folder / "bootstrap" / "set_aside" / "eft.json")
    assert "Which is it?" in aside["text"]
    assert store.read_json(folder / "models" / "M2" / "complete.json")["rows"] == 6
    assert started == []


def test_more_than_one_iteration_is_refused():
    with pytest.raises(ConfigError, match=r"method=dpo trains once .* got iterations=2\. Set iterations=1"):
        resolve(recipes.load("dpo", "smoke", ["iterations=2"]))


def test_spin_takes_one_response():
    with pytest.raises(ConfigError, match=r"method=spin .* got responses\.n=4"):
        resolve(recipes.load("spin", "smoke", ["responses.n=4"]))


def test_a_method_that_is_not_there_is_refused_with_the_near_ones():
    with pytest.raises(ConfigError, match=r"got 'self_reward'\. Did you mean self_rewarding\?"):
        resolve(recipes.load("self_rewarding", "smoke", ["method=self_reward"]))


def test_self_rewarding_needs_two_responses():
    with pytest.raises(ConfigError, match=r"got responses\.n=1"):
        resolve(recipes.load("self_rewarding", "smoke", ["responses.n=1"]))
