from collections import Counter
from itertools import combinations

import pytest

from srlm_core import data
from srlm_core.judgments import parse_verdict
from srlm_core.similarity import Similarity

INSTRUCTIONS = data.load(data.SEED / "instructions.jsonl", "examples").rows
RANKED = data.load(data.SEED / "ranked.jsonl", "groups", check=data.check_judged).rows
HELDOUT = data.load(data.SEED / "heldout.jsonl", "groups").rows
EVALUATION = data.load(data.SEED / "evaluation.jsonl", "prompts").rows
ATTACKS = data.attacks()
REQUESTS = data.requests()

KINDS = {
    "writing", "explanation", "reasoning", "arithmetic", "code", "extraction", "planning", "rewriting", "role play",
    "short facts", "refusals",
}  # fmt: skip


def test_the_corpus_has_its_sizes():
    assert len(INSTRUCTIONS) >= 200
    assert len(RANKED) >= 60
    assert len(HELDOUT) == 40
    assert len(EVALUATION) == 60
    assert len(ATTACKS) >= 20
    assert Counter(row["harmful"] for row in REQUESTS) == {True: 20, False: 20}
    assert len({row["prompt"] for row in REQUESTS}) == 40
    assert all(len(group["responses"]) == 4 for group in [*RANKED, *HELDOUT])


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [(INSTRUCTIONS, KINDS | {"everyday"}), (RANKED, KINDS), (HELDOUT, KINDS), (EVALUATION, KINDS)],
    ids=["instructions", "ranked", "heldout", "evaluation"],
)
def test_every_kind_is_there(rows, kinds):
    assert set(Counter(row["kind"] for row in rows)) == kinds


def test_everyday_answers_fit_the_demo():
    """A newcomer's model learns to finish within the 96 tokens that the demo samples: about 60 words."""
    everyday = [row for row in INSTRUCTIONS if row["kind"] == "everyday"]
    assert len(everyday) == 60
    assert max(len(row["response"].split()) for row in everyday) <= 60


def test_no_two_prompts_are_near_duplicates():
    similarity = Similarity(0.7)
    asked = [row["instruction"] for row in INSTRUCTIONS]
    for text in asked + [row["prompt"] for row in [*RANKED, *HELDOUT, *EVALUATION, *ATTACKS]]:
        assert similarity.nearest(text) is None, text
        similarity.add(text, text)


def test_ranks_are_0_to_3_and_scores_fall_with_them():
    for group in [*RANKED, *HELDOUT]:
        ordered = sorted(group["responses"], key=lambda response: response["rank"])
        assert [response["rank"] for response in ordered] == [0, 1, 2, 3]
        assert all(a["score"] > b["score"] for a, b in combinations(ordered, 2))


def test_every_written_judgment_is_read_as_its_score():
    for group in RANKED:
        for response in group["responses"]:
            assert parse_verdict(response["judgment"], "stop").value == response["score"]
            assert len(response["judgment"].split()) > 8


@pytest.mark.parametrize("groups", [RANKED, HELDOUT], ids=["ranked", "heldout"])
def test_a_judge_that_counts_letters_is_at_chance(groups):
    longer = [
        len(a["text"]) > len(b["text"])
        for group in groups
        for a, b in combinations(sorted(group["responses"], key=lambda response: response["rank"]), 2)
    ]
    assert 0.45 <= sum(longer) / len(longer) <= 0.55
