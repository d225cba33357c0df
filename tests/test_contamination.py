import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import contamination, data, sources
from srlm_core.contamination import Watch

DATA = Path(__file__).parents[2] / "shared" / "data"
MEASURING = {
    "games": [
        "Explain how a tidal power plant turns the moon into light.",
        "Name three rivers in Chile.",
        "¿Qué es el té?",
    ],
    "talks": ["Plan a quiet birthday party for a shy seven-year-old who likes moths."],
}


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("Name three rivers in Chile.", "the same words as"),
        ("  name THREE rivers, in chile", "the same words as"),
        ("¿QUÉ ES EL TE\u0301?", "the same words as"),
        ("Name three long rivers in Chile.", "nearly the same words as"),
        ("Explain how a tidal power station turns the moon into light!", "nearly the same words as"),
        ("Be kind. Plan a quiet birthday party for a shy seven year old who likes moths. Use French.", "holds"),
    ],
)
def test_a_copy_is_found_and_says_what_it_copies(text, how):
    found = Watch(MEASURING).copy_in(text)
    assert found is not None
    assert found.how == how
    assert found.prompt in MEASURING[found.measures]


@pytest.mark.parametrize("text", ["Name three cheeses of France.", "", "?!", "Qué hora es", "Explain how tea works."])
def test_what_is_no_copy_is_left_alone(text):
    assert Watch(MEASURING).copy_in(text) is None


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.data())
def test_whatever_a_prompt_is_its_own_copy_is_found(prompts, data):
    text = data.draw(st.sampled_from(prompts))
    found = Watch({"a": prompts}).copy_in(f"  {text}\n")
    assert (found is not None) == bool(contamination.words(text))


def test_common_words_alone_make_no_copy():
    watch = Watch({"a": ["What is the capital of Chad?", *(f"What is the capital of land {n}?" for n in range(40))]})
    # F = 10 / 12; but the five are in all 41, a weight of log(43 / 42) each, and `chad` and `peru` weigh log(43 / 2)
    assert watch.copy_in("What is the capital of Peru?") is None
    assert watch.copy_in("What is the old capital of Chad?") is not None
    assert Watch({"a": ["What is the capital of Chad?"]}).copy_in("What is the old capital of Chad?") is not None


def test_every_turn_of_a_conversation_is_looked_at():
    rows = [{"prompt": "[user] Hello [user] …", "turns": ["Hello", "Name three rivers in Chile"]}]
    clean, ((row, copy),) = Watch(MEASURING).sift([*rows, {"instruction": "Hello"}], data.asked)
    assert clean == [{"instruction": "Hello"}]
    assert row is rows[0]
    assert str(copy) == "the same words as a prompt that measures (games): 'Name three rivers in Chile.'"


def edits(text, rng):
    """Copies of a prompt: as it is, recased, repunctuated, and with a word less, one more, or another one."""
    said = text.split()
    at = rng.randrange(len(said))
    yield text
    yield text.upper()
    yield " ".join(word.strip(".,?!:;\"'()") for word in said) + " …"
    yield " ".join(said[:at] + said[at + 1 :])
    yield " ".join([*said[:at], "really", *said[at:]])
    yield " ".join([*said[:at], "something", *said[at + 1 :]])


@pytest.mark.skipif(not DATA.exists(), reason="the published evaluation sets are not here")
def test_planted_copies_of_published_prompts_are_all_found_and_others_are_not():
    files = ["alpaca_eval_reference.json", "mt_bench/question.jsonl", "ifeval_input.jsonl", "oasst1_en_messages.jsonl"]
    sets = {name: [t for row in sources.read(str(DATA / name)).prompts for t in data.asked(row)] for name in files}
    watch = Watch(sets)
    rng = random.Random(0)
    asked = [text for texts in sets.values() for text in texts if len(text.split()) >= 6]
    missed = [copy for text in rng.sample(asked, 200) for copy in edits(text, rng) if watch.copy_in(copy) is None]
    assert missed == []
    ours = [row["instruction"] for row in data.load(data.SEED / "instructions.jsonl", "examples").rows]
    assert [text for text in ours if watch.copy_in(text)] == []
