"""CREAM on the scripted engine: who scores what, how a label comes about, and what is left out."""

from collections import Counter

import pytest

from srlm_core import report, store

SMALL = ("responses.n=3", "iterations=2", "evaluation.models=none")


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


def test_each_model_scores_each_response_once_and_none_is_opened_twice_for_it(scripted):
    started = []

    def watch(what, told):
        if what == "engine_start":
            started.append(told["model"])

    folder = scripted(*SMALL, recipe="cream", name="cream", observers=[watch])
    # M1: writes, answers and scores; M0: scores. M2: the same, M0 and M1 score
    assert Counter(started) == {"M1": 2, "M0": 2, "M2": 1}
    assert read(folder, "logprobs_previous", 1) == []
    for t in (1, 2):
        ended = {row["response_id"] for row in read(folder, "responses", t) if row["finish_reason"] == "stop"}
        dropped = {row["id"] for row in read(folder, "drops", t) if row["stage"] == "responses"}
        for role in ("policy", "base"):
            assert {row["response_id"] for row in read(folder, f"logprobs_{role}", t)} == ended - dropped
    assert {row["model"] for row in read(folder, "logprobs_previous", 2)} == {"M1"}


def test_chosen_has_the_highest_log_ratio_and_the_label_is_the_mean_consistency(scripted):
    folder = scripted(*SMALL, "iterations=1", recipe="cream", name="cream")
    policy, base = ({row["response_id"]: row["logprob"] for row in read(folder, f"logprobs_{role}")}
                    for role in ("policy", "base"))  # fmt: skip
    rows, consistency = read(folder, "pairs"), read(folder, "consistency")
    known = [(row["correlation"] + 1) / 2 for row in consistency if row["correlation"] is not None]
    assert rows
    (label,) = {row["label"] for row in rows}
    assert label == pytest.approx(sum(known) / len(known))
    for row in rows:
        assert row["chosen_score"] == pytest.approx(policy[row["chosen_id"]] - base[row["chosen_id"]])
        assert row["chosen_score"] > row["rejected_score"]


def test_each_pair_its_own_label_by_prompt_whatever_was_skipped(scripted):
    folder = scripted(*SMALL, "iterations=2", "cream.per=pair", recipe="cream", name="cream")
    own = {row["prompt_id"]: row for row in read(folder, "consistency", 2)}
    known = [(row["correlation"] + 1) / 2 for row in own.values() if row["correlation"] is not None]
    for row in read(folder, "pairs", 2):
        of = own[row["prompt_id"]]["correlation"]
        assert row["label"] == pytest.approx(sum(known) / len(known) if of is None else (of + 1) / 2)


def test_consistency_is_in_the_report(scripted):
    folder = scripted(*SMALL, recipe="cream", name="cream")
    report.write_report(folder)
    assert "C: agreement of M\\_t with the one before" in (folder / "report" / "report.md").read_text()


def test_another_way_to_compare_scores_nothing_again(scripted):
    folder = scripted(*SMALL, "iterations=1", recipe="cream", name="cream")
    before = [store.stamp_of(path).fingerprint for path in store.parts(folder / "iter_01" / "logprobs_base")]
    made = []

    def watch(what, told):
        if what == "part" and not told["reused"]:
            made.append(told["stage"])

    changed = "cream.consistency=spearman"
    scripted(*SMALL, "iterations=1", changed, recipe="cream", name="cream", observers=[watch])
    assert set(made) == {"consistency", "pairs"}
    assert before == [store.stamp_of(path).fingerprint for path in store.parts(folder / "iter_01" / "logprobs_base")]
