"""Meta-Rewarding on the scripted engine: what is paired, what is left out, and that it goes on."""

from collections import Counter

import pytest

from srlm_core import recipes, report, show, store
from srlm_core.methods import meta_rewarding
from srlm_core.schemas import prompt_text

FOUR = ("responses.n=3", "judgments.k=4", "iterations=3", "evaluation.models=policy")


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def test_judgments_are_compared_in_both_orders_and_paired_beside_responses(tmp_path, scripted):
    folder = scripted(*FOUR, "meta.max_score_share=1.0", recipe="meta_rewarding", name="meta")
    compared, judged = read(folder, "meta_judgments"), {row["judgment_id"]: row for row in read(folder, "judgments")}
    meetings = Counter((row["first"], row["target_id"], row["other_id"]) for row in compared)
    assert set(meetings.values()) == {1}
    assert all((other, target, other) in meetings for _, target, other in meetings)
    assert all((target, target, other) in meetings for _, target, other in meetings)
    assert {judged[row["target_id"]]["target_id"] for row in compared} == {
        judged[row["other_id"]]["target_id"] for row in compared
    }
    rows = read(folder, "pairs")
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["response"] > 0
    assert kinds["judgment"] == len(read(folder, "judgment_pairs")) > 0
    for row in (row for row in rows if row["kind"] == "judgment"):
        assert prompt_text(row["messages"]).startswith("Grade a response")
        assert row["chosen"] == judged[row["chosen_id"]]["text"]
        assert judged[row["chosen_id"]]["target_id"] == judged[row["rejected_id"]]["target_id"]
        assert row["chosen_score"] > row["rejected_score"]
    assert store.read_json(folder / "models" / "M2" / "complete.json")["rows"] == len(rows)
    # from the third iteration on it trains on responses alone
    assert read(folder, "meta_judgments", 3) == read(folder, "judgment_pairs", 3) == []
    assert {row["kind"] for row in read(folder, "pairs", 3)} == {"response"}
    told = show.show(folder, compared[0]["prompt_id"])
    assert "chosen of the judgments" in told or "rejected of the judgments" in told or "no pair" in told
    report.write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "the one shown first wins" in page
    assert "of judgments, beside them" in page


def test_without_training_the_judge_it_is_self_rewarding_under_length_control(scripted):
    alone = ("meta.trains_judge=false", "pairs.length_control=0.2", "schedule=[]", "pairs.max_chosen_chars=null")
    sampling = ("responses.sampling.temperature=0.7", "judgments.sampling.temperature=0.7", "iterations=1")
    other = ("responses.n=3", "judgments.k=4", "evaluation.models=policy", *sampling)
    meta = scripted(*other, *alone, recipe="meta_rewarding", name="meta")
    plain = scripted(*other, "pairs.length_control=0.2", "responses.sampling.top_p=0.95",
                     "judgments.sampling.top_p=0.95", name="plain")  # fmt: skip
    assert read(meta, "pairs") == read(plain, "pairs") != []


def test_rho_of_each_iteration():
    config = recipes.load("meta_rewarding", "paper")
    by_iteration = [config.at(t) for t in (1, 2, 3, 4)]
    assert [at.pairs.length_control for at in by_iteration] == [0, 0.32, 0.32, 0.40]
    assert [at.meta.trains_judge for at in by_iteration] == [True, True, False, False]
    assert [at.meta.max_chosen_chars for at in by_iteration] == [1100, 1000, 1000, 1000]
    assert (config.responses.n, config.judgments.k) == (7, 11)


def test_a_change_of_the_schedule_remakes_only_what_comes_after(scripted):
    folder = scripted(*FOUR, "iterations=2", recipe="meta_rewarding", name="meta")
    before = {t: store.stamp_of(folder / f"iter_0{t}" / "pairs" / "part-00000.parquet").fingerprint for t in (1, 2)}
    later = 'schedule=[{iteration=2, set={"pairs.length_control"=0.1}}]'
    scripted(*FOUR, "iterations=2", later, recipe="meta_rewarding", name="meta")
    after = {t: store.stamp_of(folder / f"iter_0{t}" / "pairs" / "part-00000.parquet").fingerprint for t in (1, 2)}
    assert before[1] == after[1]
    assert before[2] != after[2]


@pytest.mark.parametrize(
    ("scores", "share", "left"),
    [
        ([5, 5, 5, 5, 4, 3], 0.5, {5: 2, 4: 1, 3: 1}),
        ([5, 5, 4, 4], 0.5, {5: 2, 4: 2}),
        ([5, 5, 5, 5, 5], 0.5, {}),
        ([5, 5, 5, 5, 5], 1.0, {5: 5}),
        ([], 0.5, {}),
    ],
)
def test_no_score_has_more_than_its_share_of_the_chosen_judgments(scores, share, left):
    said = {f"pair {number}": score for number, score in enumerate(scores)}
    kept = meta_rewarding.capped(said, share, seed=1)
    assert Counter(said[name] for name in kept) == left
    assert kept == meta_rewarding.capped(dict(reversed(said.items())), share, seed=1)


def test_a_chosen_judgment_that_is_too_long_makes_no_pair(scripted):
    folder = scripted(*FOUR, "iterations=1", "meta.max_chosen_chars=5", recipe="meta_rewarding", name="meta")
    assert read(folder, "judgment_pairs") == []
    reasons = {row["reason"] for row in read(folder, "drops") if row["stage"] == "judgment_pairs"}
    assert reasons <= {"judgment_too_long", "judgments_rated_equal"}
    assert "judgment_too_long" in reasons
