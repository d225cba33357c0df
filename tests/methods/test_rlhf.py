"""RLHF on the scripted engine: a reward model learns what people ranked, and scores, or rewards online."""

import json

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tables import prompts, responses

from srlm_core import recipes, rewards, schemas, show, store
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Reward
from srlm_core.errors import ModelError
from srlm_core.judgments import Task
from srlm_core.methods import METHODS, require_fit, rlhf
from srlm_core.methods.record import Shard
from srlm_core.prompts import Kept

ONE = ("responses.n=3", "iterations=1")


class Rewards:
    def __init__(self, **of):
        self.of, self.asked = of, []

    def rewards(self, rows):
        self.asked += (rows := list(rows))
        return (Reward(row.id, self.of[row.id], 5) for row in rows)


def shard(engine=None, **inputs):
    return Shard(
        config=RunConfig(method="rlhf"), iteration=1, number=0, wanted=2, given=(), policy="M1",
        models={"policy": "M1", "reward": "reward"}, engine=engine, kept=Kept.start([], None, 0.7), inputs=inputs,
    )  # fmt: skip


def test_the_highest_reward_is_paired_with_the_lowest_and_what_has_none_is_in_no_pair():
    asked = prompts("Why?", "How?", "When?")
    said = responses([
        ("p0", "a", "stop"), ("p0", "b", "stop"), ("p0", "c", "stop"), ("p0", "cut", "length"),
        ("p1", "d", "stop"), ("p1", "e", "stop"), ("p2", "f", "stop"), ("p2", "g", "stop"),
    ])  # fmt: skip
    drops = {"drops:responses": schemas.DROPS.empty_table()}
    engine = Rewards(r0=-3.0, r1=0.5, r2=-0.5, r4=1.0, r5=1.0, r6=2.0, r7=None)
    scored, left_out = rlhf.score(shard(engine, prompts=asked, responses=said, **drops))
    assert [text.id for text in engine.asked] == ["r0", "r1", "r2", "r4", "r5", "r6", "r7"]
    assert scored["reward"].to_pylist() == [-3.0, 0.5, -0.5, 1.0, 1.0, 2.0, None]
    assert [(row["id"], row["reason"]) for row in left_out.to_pylist()] == [("r7", "too_long")]
    made, without = rlhf.pair(shard(prompts=asked, responses=said, rewards=scored))
    (pair,) = made.to_pylist()
    assert (pair["chosen"], pair["rejected"]) == ("b", "a")
    assert (pair["chosen_score"], pair["rejected_score"]) == (0.5, -3.0)  # a reward may be negative
    assert {row["id"]: row["reason"] for row in without.to_pylist()}["p1"] == "tie"


def test_ranked_groups_measure_a_reward_model_by_what_they_are_judged_by():
    task = Task("t0", "p0", "Why?", "So.")
    engine = Rewards(t0=0.25)
    rows, _ = rewards.score_ranked([task], engine, model="reward")
    assert rewards.known(rows) == {"t0": 0.25}
    assert engine.asked[0].messages == ({"role": "user", "content": "Why?"},)


@pytest.mark.parametrize("method", ["rlhf", "rlhf_online"])
def test_the_reward_model_is_trained_once_from_m1_on_every_ranking_and_measured(scripted, method):
    folder = scripted(*ONE, "evaluation.own_groups=2", recipe=method, name=method)
    rows = pq.read_table(folder / "bootstrap" / "training" / "reward" / "rows.parquet").to_pylist()
    assert len(rows) == store.read_json(folder / "config.json")["seed_data"]["eft_groups"]
    assert all(len(row["responses"]) == len(row["ranks"]) > 1 for row in rows)
    trained = store.read_json(folder / "models" / "reward" / "complete.json")
    assert (trained["kind"], trained["init_from"][0], trained["reference"]) == ("reward", "M1", None)
    results = json.loads((folder / "evaluation" / "reward" / "results.json").read_text())
    assert results["judge"]["pairwise_accuracy"]["n"] > 0
    assert "responses" not in results
    again = store.read_json(folder / "models" / "reward" / "complete.json")
    scripted(*ONE, "iterations=2", recipe=method, name=method)
    assert store.read_json(folder / "models" / "reward" / "complete.json") == again


def test_online_training_is_on_prompts_alone_with_m1_as_anchor(scripted):
    folder = scripted(*ONE, "iterations=2", recipe="rlhf_online")
    last = store.read_json(folder / "models" / "M3" / "complete.json")
    assert (last["kind"], last["init_from"][0], last["reference"][0]) == ("online", "M2", "M1")
    assert last["reward"][0] == "reward"
    assert not (folder / "iter_01" / "responses").exists()
    asked = [row["prompt_id"] for row in store.iter_rows(folder / "iter_02" / "prompts")]
    assert pq.read_table(folder / "iter_02" / "training" / "rows.parquet")["id"].to_pylist() == asked


def test_a_reward_model_of_ones_own_is_not_trained_and_another_one_changes_what_follows(scripted, tmp_path):
    from srlm_core.engines.scripted import base_model

    own = base_model(tmp_path / "own", skill=0.9)
    first = scripted(*ONE, f"rlhf.reward_model={own}", recipe="rlhf")
    assert not (first / "models" / "reward").exists()
    before = store.read_json(first / "models" / "M2" / "complete.json")["fingerprint"]
    rows = list(store.iter_rows(first / "iter_01" / "rewards"))
    assert {row["model"] for row in rows} == {"reward"}
    assert (first / "evaluation" / "reward" / "results.json").exists()
    assert [path.name for path in own.iterdir()] == ["scripted.json"]  # nothing is written beside the user's model
    scripted(*ONE, recipe="rlhf")
    assert store.read_json(first / "models" / "M2" / "complete.json")["fingerprint"] != before


def test_a_reward_model_that_is_none_ends_the_run_before_anything_is_trained(scripted, tmp_path):
    with pytest.raises(ModelError, match=r"expected a scripted model .* in .*nowhere"):
        scripted(*ONE, f"rlhf.reward_model={tmp_path / 'nowhere'}", recipe="rlhf_online")
    assert not list(tmp_path.glob("c/models/*"))
    with pytest.raises(
        ValidationError, match=r"rlhf\.reward_model: expected a folder or a hub id, got 'rm@http://x/v1'"
    ):
        RunConfig.model_validate({"rlhf": {"reward_model": "rm@http://x/v1"}})


def test_no_setting_of_another_training_is_in_the_way_of_the_online_one():
    assert METHODS["rlhf_online"].learns == "online"
    require_fit(recipes.load("rlhf_online", "smoke", ["training.dpo.loss=sppo"]))


def test_what_each_response_was_given_is_shown(scripted):
    folder = scripted(*ONE, recipe="rlhf")
    row = next(row for row in store.iter_rows(folder / "iter_01" / "rewards") if row["reward"] is not None)
    assert f"reward {row['reward']:.2f} by reward" in show.show(folder, row["prompt_id"])
    folder = scripted(*ONE, recipe="sppo", name="compared")
    one = next(store.iter_rows(folder / "iter_01" / "comparisons"))
    p = one["verdict"] if one["first"] == one["target_id"] else 1 - one["verdict"]
    place = "first" if one["first"] == one["target_id"] else "second"
    told = show.show(folder, one["prompt_id"])
    assert f"by M1: {p:.2f} shown first" in told or f", {p:.2f} shown {place}" in told
    assert "no score" not in told
