"""DICE: the reward in a model that DPO has trained, and the iteration in which there is none yet."""

import pytest

from srlm_core import recipes, report, store
from srlm_core.errors import ConfigError
from srlm_core.methods import dice, require_fit

SETS = ("evaluation.models=policy", "responses.n=3")


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def test_length_is_taken_off_as_worked_by_hand():
    rewards, tokens = {"a": 0.6, "b": 0.2, "c": -0.2}, {"a": 300, "b": 100, "c": 120}
    assert dice.regularised(rewards, tokens, 0.001) == pytest.approx({"a": 0.3, "b": 0.1, "c": -0.32})
    assert dice.regularised(rewards, tokens, 0.0) == rewards


def test_people_come_first_and_then_the_models_own_reward(scripted):
    folder = scripted(*SETS, "training.dpo.replay=0.5", recipe="dice", name="dice")
    assert read(folder, "responses", 1) == read(folder, "logprobs_policy", 1) == read(folder, "logprobs_sft", 1) == []
    people = read(folder, "pairs", 1)
    assert people
    assert {row["chosen_score"] for row in people} == {None}
    now, first = (
        {row["response_id"]: row for row in read(folder, f"logprobs_{role}", 2)} for role in ("policy", "sft")
    )
    assert {row["model"] for row in now.values()} == {"M2"}
    assert {row["model"] for row in first.values()} == {"M1"}
    pairs = read(folder, "pairs", 2)
    assert pairs
    for row in pairs:
        for side in ("chosen", "rejected"):
            name = row[f"{side}_id"]
            reward = 0.1 * (now[name]["logprob"] - first[name]["logprob"]) - 0.001 * now[name]["n_tokens"]
            assert row[f"{side}_score"] == pytest.approx(reward)
        assert row["chosen_score"] > row["rejected_score"]
    rows = store.read_json(folder / "models" / "M3" / "complete.json")["rows"]
    assert rows == len(pairs) + len(people) // 2
    report.write_report(folder)


def test_another_alpha_scores_nothing_again(scripted):
    made = []

    def watch(what, told):
        if what == "part" and not told["reused"]:
            made.append((told["stage"], told["iteration"]))

    sets = (*SETS, "evaluation.models=none")
    scripted(*sets, recipe="dice", name="dice")
    scripted(*sets, "dice.alpha=0", recipe="dice", name="dice", observers=[watch])
    assert {stage for stage, t in made if t == 2} <= {"pairs"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("iterations=1", r"method=dice .*own reward, got iterations=1\. Set iterations=2 or more"),
        ("responses.n=1", r"got responses\.n=1"),
        ("training.dpo.loss=sppo", r"loss=sppo reads .*method=dice pairs by others"),
    ],
)
def test_what_does_not_go_with_it_is_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        require_fit(recipes.load("dice", "smoke", [setting]))
