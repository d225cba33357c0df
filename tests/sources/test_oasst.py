import itertools
import json
from collections import defaultdict
from pathlib import Path

import pytest

from srlm_core import sources

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "oasst1_en_messages.jsonl"


def message(id, parent, text, role=None, *, tree="t", **told):
    role = role or ("prompter" if parent is None else "assistant")
    usual = {"lang": "en", "review_result": True, "deleted": False, "rank": None, "synthetic": False}
    return {"message_id": id, "parent_id": parent, "message_tree_id": tree, "text": text, "role": role, **usual, **told}


TREE = [
    message("q", None, "What is tea?"),
    message("a", "q", "A drink.", rank=1),
    message("b", "q", "A drink of leaves in hot water.", rank=0),
    message("c", "q", "Leaf it out!", rank=None, review_result=False),
    message("d", "q", "Gone.", rank=2, deleted=True),
    message("e", "q", "Not ranked.", rank=None),
    message("q2", "b", "Which leaves?", "prompter"),
    message("a2", "q2", "Camellia sinensis.", rank=0),
    message("b2", "q2", "Green ones.", rank=1),
    message("q3", "c", "Why?", "prompter"),
    message("a3", "q3", "Because.", rank=0),
    message("b3", "q3", "No.", rank=1),
]


def write(tmp_path, rows):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def nested(rows):
    """The same messages as one tree."""
    replies = defaultdict(list)
    for row in rows:
        replies[row["parent_id"]].append(row)

    def whole(row):
        body = {key: value for key, value in row.items() if key not in ("parent_id", "message_tree_id")}
        return {**body, "replies": [whole(reply) for reply in replies[row["message_id"]]]}

    (root,) = replies[None]
    return {"message_tree_id": root["message_tree_id"], "tree_state": "ready_for_export", "prompt": whole(root)}


@pytest.mark.parametrize(("form", "rows"), [("oasst messages", TREE), ("oasst trees", [nested(TREE)])])
def test_a_tree_gives_its_example_and_its_ranked_groups(tmp_path, form, rows):
    found = sources.read(write(tmp_path, rows))
    assert found.form == form
    assert found.prompts == [{"prompt": "What is tea?"}]
    assert found.examples == [{"instruction": "What is tea?", "response": "A drink of leaves in hot water."}]
    first, second = found.groups
    assert [(r["text"], r["rank"]) for r in first["responses"]] == [
        ("A drink.", 1),
        ("A drink of leaves in hot water.", 0),
    ]
    assert second["prompt"] == (
        "[user] What is tea?\n\n[assistant] A drink of leaves in hot water.\n\n[user] Which leaves?"
    )
    assert "turns" not in first
    assert second["turns"] == ["What is tea?", "Which leaves?"]
    told = found.as_dict()
    assert (told["trees"], told["messages"], told["ranked_groups"], told["ordered_pairs"]) == (1, 12, 2, 2)
    assert told["first_turn"] == {"ranked_groups": 1, "ordered_pairs": 1}
    assert told["set_aside"] == {
        "failed its review": 1, "deleted": 1, "a reply without a rank": 1, "below a message that is set aside": 3,
    }  # fmt: skip


def test_another_language_a_lost_parent_and_an_id_used_twice_are_set_aside(tmp_path):
    rows = [
        message("de", None, "Was ist Tee?", tree="u", lang="de"),
        message("de1", "de", "Ein Getränk.", tree="u", lang="de", rank=0),
        message("x", "nowhere", "Lost.", rank=0),
        *TREE[:3],
        TREE[2],
        message("empty", "q", " ", rank=3),
        message("bot", None, "I ask.", "assistant", tree="v"),
    ]
    found = sources.read(write(tmp_path, rows))
    assert found.counts["languages"] == {"en": 2, "de": 1}
    assert found.as_dict()["set_aside"] == {
        "another language: de": 2, "its parent is not in the file": 1, "its message_id occurs before": 1,
        "an empty text": 1, "a first message that asks nothing": 1,
    }  # fmt: skip
    assert len(found.groups) == 1
    german = sources.read(write(tmp_path, rows), language="de")
    assert german.examples == [{"instruction": "Was ist Tee?", "response": "Ein Getränk."}]


def test_without_its_best_reply_a_prompt_makes_no_example(tmp_path):
    rows = [message("q", None, "?"), message("a", "q", "one", rank=1), message("b", "q", "two", rank=2)]
    found = sources.read(write(tmp_path, rows))
    assert found.examples == []
    assert len(found.groups) == 1
    assert "no example: its best-ranked reply is not there" in found.as_dict()["set_aside"]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published messages are not here")
def test_published_messages_are_counted_as_by_an_independent_count():
    rows = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
    found = sources.read(str(PUBLISHED)).as_dict()
    by_id = {row["message_id"]: row for row in rows}

    def good(row):
        whole = not row["deleted"] and row["review_result"] is not False
        return whole and (row["parent_id"] is None or good(by_id[row["parent_id"]]))

    ranks = defaultdict(list)
    for row in rows:
        if row["role"] == "assistant" and row["rank"] is not None and good(row):
            ranks[row["parent_id"]].append(row["rank"])
    groups = {parent: replies for parent, replies in ranks.items() if len(replies) > 1}
    pairs = [(a, b) for replies in groups.values() for a, b in itertools.combinations(replies, 2) if a != b]
    assert found["trees"] == len({row["message_tree_id"] for row in rows}) == 94
    assert found["prompts"] == sum(row["parent_id"] is None and row["lang"] == "en" and good(row) for row in rows)
    assert found["ranked_groups"] == len(groups)
    assert found["ordered_pairs"] == len(pairs) >= found["taken"]["ordered_pairs"]
