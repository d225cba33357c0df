"""SPPO: best against worst by mean win rate."""

import pytest

from srlm_core import comparisons, recipes, report, store
from srlm_core.engines.protocol import TokenScores
from srlm_core.engines.scripted import ScriptedEngine
from srlm_core.errors import NothingLeft
from srlm_core.methods import require_fit
from srlm_core.plan import Iteration

SETS = ("responses.n=3", "iterations=2", "evaluation.models=policy")


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def test_the_pair_is_the_highest_and_the_lowest_mean_win_rate(scripted):
    folder = scripted(*SETS, recipe="sppo", name="sppo")
    for t in (1, 2):
        found = [
            comparisons.win_rates(store.read_part(path)) for path in store.parts(folder / f"iter_0{t}/comparisons")
        ]
        mean = {name: value for of in found for name, value in of.mean.items()}
        prompt_of = {row["response_id"]: row["prompt_id"] for row in read(folder, "responses", t)}
        whole = {row["response_id"] for row in read(folder, "responses", t) if row["finish_reason"] == "stop"}
        pairs = read(folder, "pairs", t)
        assert pairs
        for row in pairs:
            of_prompt = [value for name, value in mean.items() if prompt_of[name] == row["prompt_id"] and name in whole]
            assert (row["chosen_score"], row["rejected_score"]) == pytest.approx((max(of_prompt), min(of_prompt)))
            assert 0 <= row["rejected_score"] < row["chosen_score"] <= 1
        learnt = store.read_part(folder / f"iter_0{t}" / "training" / "rows.parquet").to_pylist()
        scores = {row["pair_id"]: (row["chosen_score"], row["rejected_score"]) for row in pairs}
        assert {row["id"]: (row["chosen_score"], row["rejected_score"]) for row in learnt} == scores
    report.write_report(folder)
    assert "comparisons that the order decides" in (folder / "report" / "report.md").read_text()


def test_another_seed_of_the_same_campaign_is_the_same_bytes(scripted):
    one, two = (scripted(*SETS, "iterations=1", recipe="sppo", name=name) for name in ("a", "b"))
    assert read(one, "pairs") == read(two, "pairs")


def test_a_prompt_too_long_to_compare_makes_no_pair_and_is_counted(scripted, monkeypatch):
    answer = ScriptedEngine.token_scores

    def forgetful(self, requests, choices):
        for number, scores in enumerate(answer(self, requests, choices)):
            yield scores if number % 2 else TokenScores(scores.request_id, None, "too_long")

    monkeypatch.setattr(ScriptedEngine, "token_scores", forgetful)
    with pytest.raises(NothingLeft, match=r"judge_prompt_too_long"):
        scripted(*SETS, recipe="sppo", name="sppo")


def test_win_rates_of_another_method_may_train_by_the_loss_as_well():
    require_fit(recipes.load("dno", "smoke", ["dno.judge_by=win_rate", "training.dpo.loss=sppo"]))
    assert recipes.load("sppo", "paper").training.dpo.loss == "sppo"


def test_the_plan_counts_what_is_compared_and_what_is_scored():
    scores, rates = recipes.load("dno", "smoke"), recipes.load("dno", "smoke", ["dno.judge_by=win_rate"])
    asked = [Iteration.of(config, 1, 10) for config in (recipes.load("sppo", "smoke"), scores, rates)]
    counted = [(one.requests("judgments"), one.requests("comparisons")) for one in asked]
    assert counted == [(0, 200), (180, 0), (0, 300)]  # dno's reference is one of 6
