"""DNO: which pairs have a large margin, what is given once, and what is replayed."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import recipes, report, show, store
from srlm_core.config import DnoConfig
from srlm_core.errors import ConfigError, NothingLeft
from srlm_core.methods import dno, require_fit
from srlm_core.methods.dno import Candidate, capped, large_margins

PAPER = DnoConfig(min_positive=5, reference_margin=2, own_margin=1)
"""Their thresholds, on their scale to 6."""

GOLD = [Candidate("gold", 5, is_reference=True)]
OWN = [Candidate(f"y{number}", score) for number, score in enumerate((6, 5, 4, 3, 3), start=1)]


def names(found):
    return [(chosen.name, rejected.name) for chosen, rejected in found]


def test_the_ten_pairs_worked_by_hand():
    found = names(large_margins(GOLD + OWN, PAPER))
    assert found == [
        ("gold", "y4"), ("gold", "y5"), ("y1", "gold"), ("y1", "y2"), ("y1", "y3"), ("y1", "y4"), ("y1", "y5"),
        ("y2", "y3"), ("y2", "y4"), ("y2", "y5"),
    ]  # fmt: skip
    restricted = PAPER.model_copy(update={"restrictive": True})
    assert names(large_margins(GOLD + OWN, restricted)) == [("gold", "y4"), ("gold", "y5")]


def test_the_pairs_of_the_self_rewarding_form():
    """Means of three verdicts: 4.67, 4, 3.67, 2.33; the lead of the first over the third is 1 but for its last bit."""
    means = [(5 + 5 + 4) / 3, 4.0, (4 + 4 + 3) / 3, (3 + 2 + 2) / 3]
    found = large_margins([Candidate(str(number), mean) for number, mean in enumerate(means, start=1)], DnoConfig())
    assert names(found) == [("1", "3"), ("1", "4"), ("2", "4")]


def test_without_a_positive_there_is_no_pair():
    low = [Candidate("gold", 3, is_reference=True), Candidate("y1", 3.9), Candidate("y2", 0)]
    assert large_margins(low, DnoConfig()) == []
    assert dno._why_no_pair(low, DnoConfig()) == "no_positive"
    assert dno._why_no_pair(low[:1], DnoConfig()) == "fewer_than_two_scored"
    assert dno._why_no_pair([Candidate("a", 5), Candidate("b", 5)], DnoConfig()) == "margin_too_small"
    assert dno._why_no_pair([Candidate("a", 5, may_be_chosen=False)] * 2, DnoConfig()) == "none_may_be_chosen"


def test_what_may_not_be_chosen_is_no_positive_however_well_it_scored():
    loop = Candidate("loop", 5, may_be_chosen=False)
    assert names(large_margins([loop, Candidate("good", 4), Candidate("bad", 1)], DnoConfig())) == [("good", "bad")]
    cut = Candidate("cut", 1, may_be_chosen=False, may_be_rejected=False)
    assert large_margins([Candidate("good", 5), cut], DnoConfig()) == []


def test_by_win_rates_a_lead_is_enough():
    by = DnoConfig(judge_by="win_rate", win_margin=0.2)
    of = [Candidate("a", 0.7), Candidate("b", 0.5, is_reference=True), Candidate("c", 0.3)]
    assert names(large_margins(of, by)) == [("a", "b"), ("a", "c"), ("b", "c")]  # 0.7 - 0.5 is 0.19999…


def test_a_prompt_of_many_pairs_keeps_those_of_the_largest_lead():
    found = large_margins(GOLD + OWN, PAPER)
    kept = capped(found, 3, seed=1)
    assert {("y1", "y4"), ("y1", "y5")} < set(names(kept))  # leads of 3; of those of 2 one is drawn
    assert sorted(chosen.worth - rejected.worth for chosen, rejected in kept) == [2, 3, 3]
    assert kept == capped(found, 3, seed=1)
    assert len({tuple(names(capped(found, 3, seed=seed))) for seed in range(20)}) > 1
    assert capped(found, None, seed=1) == found


@given(
    st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.booleans(), st.booleans()), max_size=6),
    st.integers(1, 5),
)
def test_whatever_the_scores_a_pair_has_a_positive_a_lead_and_two_sides(rows, most):
    of = [Candidate(str(number), *row) for number, row in enumerate(rows)]
    found = large_margins(of, DnoConfig())
    for chosen, rejected in found:
        assert chosen.worth >= 4 - 1e-9
        assert chosen.may_be_chosen
        assert rejected.may_be_rejected
        assert chosen.worth - rejected.worth >= (2 if chosen.is_reference else 1) - 1e-9
        assert chosen.name != rejected.name
    assert len(capped(found, most, seed=0)) == min(most, len(found))
    assert set(capped(found, most, seed=0)) <= set(found)


# --- campaigns ------------------------------------------------------------------------------------------------------

SOUND = "Sound: this settles what was asked. Sound: an example makes it plain."


def ift(path, n=24, response=SOUND):
    rows = [{"instruction": f"Describe thing number {i} of {n}.", "response": f"{response} Of {i}."} for i in range(n)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"seed_data.ift={json.dumps(str(path))}"


def read(folder, dataset, t=1):
    return list(store.iter_rows(folder / f"iter_{t:02d}" / dataset))


LOW = ("dno.min_positive=2", "dno.reference_margin=1", "seed_data.ift_rows=null", "evaluation.models=policy")


def test_a_campaign_pairs_all_three_kinds_and_each_reference_is_used_once(tmp_path, scripted):
    folder = scripted(ift(tmp_path / "ift.jsonl"), *LOW, recipe="dno", name="dno")
    asked = [{row["messages"][0]["content"] for row in read(folder, "prompts", t)} for t in (1, 2)]
    assert len(asked[0]) == len(asked[1]) == 12
    assert not asked[0] & asked[1]
    types = Counter()
    for t in (1, 2):
        said = {row["response_id"]: row for row in read(folder, "responses", t)}
        references = [row for row in said.values() if row["source"] == "reference"]
        assert len(references) == 12
        assert {(row["index"], row["n_tokens"]) for row in references} == {(5, None)}
        scored = {row["target_id"] for row in read(folder, "judgments", t)}
        assert {row["response_id"] for row in references} <= scored
        assert read(folder, "comparisons", t) == []
        pairs, told = read(folder, "pairs", t), store.read_json(folder / f"iter_{t:02d}" / "measures.json")
        kinds = Counter(
            f"{said[row['chosen_id']]['source']} over {said[row['rejected_id']]['source']}".replace("policy", "own")
            for row in pairs
        )
        for name in dno.TYPES:
            assert told[f"pairs_{name.replace(' ', '_')}"]["value"] == pytest.approx(kinds[name] / len(pairs))
        assert told["pairs_per_prompt"]["value"] == pytest.approx(len(pairs) / 12)
        for row in pairs:
            assert row["chosen_score"] >= 2
            assert row["chosen_score"] - row["rejected_score"] >= 1 - 1e-9
            assert said[row["chosen_id"]]["finish_reason"] == "stop"
        types += kinds
    assert set(types) == set(dno.TYPES)
    report.write_report(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "own over reference, share of pairs" in page
    pairs = read(folder, "pairs")
    assert "from the data (reference)" in show.show(folder, pairs[0]["prompt_id"])
    (both, *_) = {row["chosen_id"] for row in pairs} & {row["rejected_id"] for row in pairs}
    prompt = next(row["prompt_id"] for row in pairs if row["chosen_id"] == both)
    assert "← chosen and rejected" in show.show(folder, prompt)


def test_its_own_judge_by_win_rates_asks_for_no_score(tmp_path, scripted):
    sets = (ift(tmp_path / "ift.jsonl"), *LOW, "dno.judge_by=win_rate", "dno.max_pairs_per_prompt=2", "iterations=1")
    folder = scripted(*sets, recipe="dno", name="dno")
    assert read(folder, "judgments") == []
    told = store.read_json(folder / "iter_01" / "measures.json")
    assert 0 <= told["comparison_flip_rate"]["value"] <= 1
    assert told["worth_of_own"]["n"] == len({row["target_id"] for row in read(folder, "comparisons")} | {
        row["other_id"] for row in read(folder, "comparisons")}) - 12  # fmt: skip
    per_prompt = Counter(row["prompt_id"] for row in read(folder, "pairs"))
    assert per_prompt
    assert max(per_prompt.values()) <= 2
    for row in read(folder, "pairs"):
        assert 0 <= row["rejected_score"] < row["chosen_score"] <= 1


def test_a_sample_that_is_the_reference_word_for_word_is_left_out(tmp_path, scripted):
    first = scripted(ift(tmp_path / "ift.jsonl"), *LOW, "iterations=1", recipe="dno", name="one")
    asked = {row["prompt_id"]: row["messages"][0]["content"] for row in read(first, "prompts")}
    said = {asked[row["prompt_id"]]: row["response"] for row in read(first, "responses") if row["index"] == 0}
    rows = [{"instruction": text, "response": f" {response}"} for text, response in said.items()]
    (tmp_path / "again.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    again = f"seed_data.ift={json.dumps(str(tmp_path / 'again.jsonl'))}"
    folder = scripted(again, *LOW, "iterations=1", recipe="dno", name="two")
    texts = Counter((row["prompt_id"], row["response"].strip()) for row in read(folder, "responses"))
    copies = [row for row in read(folder, "drops") if row["reason"] == "same_as_the_reference"]
    assert len(copies) == sum(count > 1 for count in texts.values())
    scored = {row["target_id"] for row in read(folder, "judgments")}
    assert not scored & {row["id"] for row in copies}


def test_a_reference_that_is_never_good_enough_stops_it_and_says_what_to_lower(tmp_path, scripted):
    sets = (ift(tmp_path / "ift.jsonl"), "seed_data.ift_rows=null", "evaluation.models=none")
    with pytest.raises(NothingLeft, match=r"no_positive.*lower the scores and margins"):
        scripted(*sets, "dno.min_positive=5", "dno.restrictive=true", recipe="dno")


def test_too_few_references_for_all_iterations_are_refused_before_the_first(tmp_path, scripted):
    with pytest.raises(NothingLeft, match=r"each instruction of seed_data.ift once: .*got 24\. Lower prompts.target"):
        scripted(ift(tmp_path / "ift.jsonl"), *LOW, "iterations=3", recipe="dno")
    assert not (tmp_path / "c" / "iter_01" / "prompts").exists()


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["pairs.min_margin=1"], r"pairs by the margins under dno, got pairs\.min_margin=1"),
        (["pairs.length_control=0.2"], r"pairs by the margins under dno, got pairs\.length_control=0\.2"),
        (["prompts.file=x.txt", "prompts.file_share=0.5"], r"got prompts\.file=x\.txt"),
    ],
)
def test_what_does_not_go_with_it_is_refused(sets, said):
    with pytest.raises(ConfigError, match=said):
        require_fit(recipes.load("dno", "smoke", sets))
