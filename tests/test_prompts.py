import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import prompts
from srlm_core.config import PromptsConfig
from srlm_core.contamination import Watch
from srlm_core.engines.protocol import Completion

CONFIG = PromptsConfig()
SEEDS = [f"Seed task number {n} about subject {n * 7}" for n in range(20)]


class Writer:
    """Continues the list with given texts, in the order of the requests, whatever order they come back in."""

    kind, context, capabilities = "test", 4096, frozenset({"generate"})

    def __init__(self, texts, shuffle=None):
        self.texts, self.shuffle, self.asked = list(texts), shuffle, []

    def generate(self, requests):
        done = []
        for request in requests:
            self.asked.append(request)
            text = self.texts.pop(0) if self.texts else " " + " ".join(f"w{n}x{len(self.asked)}" for n in range(6))
            done.append(Completion(request.id, 0, text, 9, "stop"))
        if self.shuffle:
            self.shuffle.shuffle(done)
        yield from done


def written(writer, wanted, config=CONFIG, measuring=()):
    kept = prompts.Kept.start(SEEDS, Watch({"a": measuring}), config.max_similarity)
    rows, drops = prompts.write(writer, kept, config, wanted=wanted, iteration=1, shard=0, generator="M1", seed=3)
    return [row["messages"][0]["content"] for row in rows.to_pylist()], drops.to_pylist()


TEXTS = st.text(alphabet="ab ", min_size=1, max_size=24)


@given(st.lists(TEXTS, min_size=1, max_size=8), st.lists(TEXTS, max_size=8), TEXTS)
def test_what_was_on_trial_is_forgotten(before, tried, new):
    kept = prompts.Kept.start(before, Watch({}), 0.5)
    said = kept.similarity.nearest(new)
    with kept.on_trial():
        for text in tried:
            kept.add(text, generated=True)
    assert kept.similarity.nearest(new) == said
    assert kept.generated == []
    assert len(kept.similarity) == len(before)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Why so?", "too_short"),
        ("word " * 151, "too_many_words"),
        ("Describe this image in one sentence please", "forbidden_word"),
        ("Go to the shop and buy some milk", "forbidden_word"),
        ("Write a program that sorts a list", "forbidden_form"),
        ("- a bullet that came along from somewhere", "forbidden_form"),
        ("Übersetze diesen Satz bitte ins Englische heute", "forbidden_form"),
        ("Explain how imagery works in a poem", None),
        ("Explain the tides to a child", None),
    ],
)
def test_forms_that_self_instruct_refuses(text, reason):
    assert prompts.unusable(text, CONFIG) == reason


def test_eight_demonstrations_of_which_two_are_generated():
    rng = random.Random(1)
    drawn = prompts.demonstrations(SEEDS, ["new one here", "new two here", "new three here"], CONFIG, rng)
    assert len(drawn) == len(set(drawn)) == 8
    assert sum(text.startswith("new") for text in drawn) == 2
    assert len(prompts.demonstrations(SEEDS, [], CONFIG, rng)) == 8


def test_completion_form_is_raw_text_to_continue_and_chat_form_a_users_turn():
    raw = prompts.render(["a", "b"], CONFIG, request_id="x", seed=0)
    assert raw.messages == ()
    assert raw.prefix == "Come up with a series of tasks:\n1. a\n2. b\n3."
    chat = prompts.render(["a", "b"], PromptsConfig(form="chat"), request_id="x", seed=0)
    assert chat.messages[0]["role"] == "user"
    assert chat.prefix == "3."


def test_rendering_is_independent_of_earlier_calls():
    first = prompts.render(["a"], CONFIG, request_id="x", seed=0)
    prompts.render(["b"], CONFIG, request_id="y", seed=0)
    assert prompts.render(["a"], CONFIG, request_id="x", seed=0) == first


def test_the_last_task_of_a_cut_completion_is_left_out():
    config = PromptsConfig(per_request=3)
    cut = Completion(
        "x", 0, " First whole task here.\n10. Second whole task here.\n11. Third task that breaks o", 30, "length"
    )
    assert prompts.read_tasks(cut, config) == ["First whole task here.", "Second whole task here."]
    assert prompts.read_tasks(cut._replace(finish_reason="stop"), config)[-1].startswith("Third")


def test_near_copies_of_seeds_of_kept_prompts_and_of_what_measures_are_dropped_with_their_reason():
    measuring = ["How do honey bees find their way home again?"]
    texts = [
        " " + SEEDS[3],
        " How do honey bees find their way home?",
        " Tell me about the oldest bridge in town",
        " Tell me about the oldest bridge in a town",
    ]
    kept, drops = written(Writer(texts), 2, measuring=measuring)
    assert "Tell me about the oldest bridge in town" in kept
    assert {row["reason"] for row in drops} >= {"similar_to_seed", "copy_of_evaluation", "similar_to_kept"}


def test_filtering_goes_in_request_order_not_in_arrival_order():
    texts = [f" Explain thing {n // 2} number {n // 2} in the {n} way of {n // 2} and {n // 2}" for n in range(12)]
    assert written(Writer(texts), 6) == written(Writer(texts, random.Random(5)), 6)


def test_asking_ends_at_the_target_and_what_is_over_is_named():
    writer = Writer([])
    kept, drops = written(writer, 5)
    assert len(kept) == 5
    assert all(row["reason"] == "over_target" for row in drops)


def test_asking_ends_at_the_limit_of_attempts():
    writer = Writer([" no"] * 1000)
    kept, drops = written(writer, 10, PromptsConfig(max_attempts=2))
    assert kept == []
    assert len(writer.asked) == 20  # twice the target
    assert {row["reason"] for row in drops} == {"too_short"}


def test_users_prompts_are_taken_in_order_through_the_same_filter():
    kept = prompts.Kept.start(SEEDS, Watch({}), 0.7)
    rows, drops = prompts.take(
        ["My own first question?", "My own first question!", SEEDS[0]], kept, iteration=1, source="dataset:x"
    )
    assert [row["messages"][0]["content"] for row in rows.to_pylist()] == ["My own first question?"]
    assert [row["reason"] for row in drops.to_pylist()] == ["similar_to_kept", "similar_to_seed"]


def test_only_the_seeds_to_be_shown_are_shown_and_all_are_kept_apart_from():
    shown = SEEDS[:8]
    kept = prompts.Kept.start(SEEDS, Watch({}), 0.7, shown=shown)
    writer = Writer([f" {SEEDS[15]}"])
    config = PromptsConfig(seed_demonstrations=8, generated_demonstrations=0)
    _, drops = prompts.write(writer, kept, config, wanted=1, iteration=1, shard=0, generator="M1", seed=3)
    for request in writer.asked:
        assert all(f". {text}\n" in request.prefix for text in shown)
    assert [row["reason"] for row in drops.to_pylist()] == ["similar_to_seed"]
