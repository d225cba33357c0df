import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srlm_core import sources
from srlm_core.sources.forms import Reply, distinct, n_ordered_pairs, ranked, read_row

LLMBAR = Path(__file__).parents[3] / "shared" / "data" / "llmbar" / "natural.json"
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row", "instruction", "response"),
    [
        ({"instruction": "Add", "input": "2, 2", "output": "4"}, "Add\n\n2, 2", "4"),
        ({"instruction": "Add", "input": "", "output": "4"}, "Add", "4"),
        ({"instruction": "Add", "input": "<noinput>", "output": "4"}, "Add", "4"),
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", "4"),
        ({"question": "2 + 2?", "answer": "4"}, "2 + 2?", "4"),
        ({"messages": CHAT}, "2 + 2?", "4"),
        ({"messages": [*CHAT, {"role": "user", "content": "Sure?"}]}, "2 + 2?", "4"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "2 + 2?", "4"),
        ({"instruction": "Add", "instances": [{"input": "2, 2", "output": "4"}]}, "Add\n\n2, 2", "4"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "2 + 2?", "4"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "2 + 2?", "4"),
        ({"prompt": "2 + 2?", "responses": [{"text": "5", "rank": 2}, {"text": "4", "rank": 1}]}, "2 + 2?", "4"),
    ],
)
def test_an_example_in_each_published_form(row, instruction, response):
    (example,) = read_row(1, row).examples
    assert example == {"instruction": instruction, "response": response}
    assert read_row(1, row).prompts == ({"prompt": instruction},)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "2 + 2?", "output_1": "4", "output_2": "5", "label": 1},
        {"input": "2 + 2?", "output_1": "5", "output_2": "4", "label": "2"},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "5"}]},
        {"instruction": "2 + 2?", "completions": [{"response": "5", "score": 1}, {"response": "4", "score": 4.5}]},
    ],
)
def test_a_ranking_in_each_published_form(row):
    (group,) = read_row(1, row).groups
    assert group["prompt"] == "2 + 2?"
    assert {response["text"]: response["rank"] for response in group["responses"]} == {"4": 0, "5": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [*CHAT, {"role": "user", "content": "Sure?"}], "chosen": "Yes.", "rejected": "No."},
        {
            "chosen": [*CHAT, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}],
            "rejected": [*CHAT, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}],
        },
        {
            "prompt": [*CHAT, {"role": "user", "content": "Sure?"}],
            "responses": [{"text": "No.", "rank": 1}, {"text": "Yes.", "rank": 0}],
        },
    ],
)
def test_a_ranking_of_a_later_turn_makes_neither_a_prompt_nor_an_example(row):
    found = read_row(1, row)
    (group,) = found.groups
    assert (group["turns"], found.examples, found.prompts) == (["2 + 2?", "Sure?"], (), ())
    assert group["prompt"] == "[user] 2 + 2?\n\n[assistant] 4\n\n[user] Sure?"


def test_ties_share_a_rank_and_make_no_ordered_pair():
    rated = zip("abcd", [0.5, 1, 0.5, 0], strict=True)
    (group,) = read_row(1, {"prompt": "p", "responses": [{"text": t, "quality": q} for t, q in rated]}).groups
    assert [response["rank"] for response in group["responses"]] == [1, 0, 1, 3]
    assert n_ordered_pairs(group) == 5


def test_what_a_row_says_beside_is_kept():
    responses = [{"text": "a", "rank": 0, "score": 5, "judgment": "Good."}, {"text": "b", "rank": 1, "score": 2}]
    (group,) = read_row(1, {"kind": "k", "prompt": "p", "responses": responses}).groups
    assert group == {"kind": "k", "prompt": "p", "responses": responses}


@pytest.mark.parametrize(
    ("responses", "reasons"),
    [
        ([{"text": "a", "rank": 0}], ["fewer than two usable"]),
        ([{"text": "a", "rank": 0}, {"text": "b", "rank": None}], ["a response without a number", "fewer than two"]),
        ([{"text": "a", "rank": 0}, {"text": " ", "rank": 1}], ["expected a non-empty text", "fewer than two"]),
        ([{"text": "a", "rank": 1}, {"text": "b", "rank": 1}], ["all responses are ranked alike"]),
        ([{"text": "a", "rank": 0}, {"text": "a", "rank": 1}], ["the same text", "fewer than two"]),
        ([{"text": "a", "quality": float("nan")}, "b"], ["a response without a number", "each response as", "fewer"]),
        ([{"text": "a", "rank": True}, {"text": "b", "rank": 1}], ["a response without a number", "fewer"]),
    ],
)
def test_a_ranking_that_says_nothing_is_set_aside_with_its_reason(responses, reasons):
    found = read_row(7, {"prompt": "p", "responses": responses})
    assert not found.groups
    assert [aside.line for aside in found.set_aside] == [7] * len(reasons)
    for aside, reason in zip(found.set_aside, reasons, strict=True):
        assert reason in aside.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "got nothing"),
        ({"txt": 1}, "got txt"),
        ({"prompt": "p", "completion": 3}, "expected a non-empty response"),
        ({"prompt": ["", ""]}, "expected a non-empty text under prompt"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "begins with the user"),
        ({"messages": ["hi"]}, "expected turns with role and content"),
        ({"messages": [CHAT[0], CHAT[0]]}, "expected the assistant's turn"),
        ({"input": "p", "output_1": "a", "output_2": "b", "label": 0}, "expected 1 or 2 under 'label', got 0"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "both responses are the same"),
        ({"chosen": CHAT, "rejected": [{**CHAT[0], "content": "3 + 3?"}, CHAT[1]]}, "answer different prompts"),
        ({"prompt": [*CHAT, CHAT[0]], "completion": "4"}, "several turns"),
        ({"prompt": [{"role": "user", "content": ""}], "completion": "4"}, "expected no empty turn"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "a text or a conversation"),
        ({"instruction": "i", "instances": []}, "expected a non-empty response"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, reason):
    found = read_row(3, row)
    assert (found.examples, found.groups, found.prompts) == ((), (), ())
    assert reason in found.set_aside[0].reason


KEYS = [
    "prompt", "instruction", "input", "output", "output_1", "output_2", "label", "messages", "role", "content", "from",
    "value", "responses", "text", "rank", "quality", "chosen", "rejected", "instances", "turns", "message_id",
    "parent_id", "message_tree_id", "replies", "lang", "deleted",
]  # fmt: skip
LEAF = (
    st.none() | st.booleans() | st.floats() | st.sampled_from(["", " ", "a", "b", "user", "assistant", "prompter", "1"])
)
OBJECT = st.dictionaries(st.sampled_from(KEYS), LEAF | st.lists(LEAF, max_size=2), max_size=4)
JSON = LEAF | OBJECT | st.lists(LEAF | OBJECT, max_size=3)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6), max_size=4))
def test_no_row_whatever_it_holds_ends_the_reading(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sources.read(str(path))
    assert found.n_rows == len(rows)
    for example in found.examples:
        assert example["instruction"].strip()
        assert example["response"].strip()
    for group in found.groups:
        assert n_ordered_pairs(group) > 0
    assert sources.as_text(found)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_rank_is_the_number_of_better_responses_and_each_text_stands_once(replies):
    kept = distinct([Reply(text, bad) for text, bad in replies])
    best = {text: min(bad for other, bad in replies if other == text) for text, _ in replies}
    assert {reply.text: reply.bad for reply in kept} == best
    assert len(kept) == len(best)
    for response in ranked("p", kept)["responses"]:
        assert response["rank"] == sum(bad < best[response["text"]] for bad in best.values())


def test_prompts_stand_once_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "b", "kind": "first"}, {"turns": ["a", "again"]}, {"question": "b", "kind": "second"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sources.read(str(path)).prompts == [
        {"prompt": "b", "kind": "first"},
        {"prompt": "a", "turns": ["a", "again"]},
    ]


@pytest.mark.skipif(not LLMBAR.exists(), reason="the published file is not beside this checkout")
def test_llmbars_labelled_pairs_are_read_whole():
    found = sources.read(str(LLMBAR))
    rows = json.loads(LLMBAR.read_text())
    assert (found.n_rows, len(found.groups), found.set_aside) == (len(rows), len(rows), [])
    for row, group in zip(rows, found.groups, strict=True):
        best = next(response["text"] for response in group["responses"] if response["rank"] == 0)
        assert best == row[f"output_{row['label']}"]
