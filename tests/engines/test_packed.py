"""A batch computed as a tree changes how long a pass takes, and nothing that it computes."""

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")

RUBRIC = list(range(100, 190))
"""90 tokens that many rows begin with."""
REQUEST = list(range(200, 230))
"""30 tokens that some of them go on with."""


def rows() -> list[list[int]]:
    """Six rows of one rubric, three with the same request; two of another; one alone; one short; one twice."""
    alike = [RUBRIC + list(range(start, start + size)) for start, size in ((10, 20), (11, 5), (300, 5))]
    asked = [RUBRIC + REQUEST + list(range(start, start + size)) for start, size in ((10, 3), (40, 25), (60, 1))]
    others = [list(range(400, 470)) + [7] * size for size in (1, 30)]
    return [*alike, *asked, *others, list(range(900, 1000)), [5, 6, 7], RUBRIC + REQUEST + [60]]


def batch(sequences: list[list[int]]) -> tuple[Any, Any]:
    width = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    return ids, mask


def model(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, **config)).train()


def packed(**config: Any) -> Any:
    from srlm_core.engines.packed import pack

    net = model(**config)
    assert pack(net)
    return net


def pass_through(net: Any, ids: Any, mask: Any) -> tuple[Any, dict[str, Any]]:
    """Hidden states where there are tokens, and the gradients of a loss on them."""
    net.zero_grad()
    states = net.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return states.detach(), {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def test_states_and_gradients_are_those_of_the_plain_pass() -> None:
    ids, mask = batch(rows())
    states, gradients = pass_through(model(), ids, mask)
    packed_states, packed_gradients = pass_through(packed(), ids, mask)
    torch.testing.assert_close(packed_states, states, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_twice_and_no_padding_at_all() -> None:
    ids, mask = batch(rows())
    net, seen = packed(), []
    net.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    net.model(input_ids=ids, attention_mask=mask)
    rubric, two_ends = 90 + (20 + 5 + 5) + (30 + 3 + 25 + 1), 70 + 30
    assert seen == [rubric + two_ends + 100 + 3]
    assert ids.numel() == 11 * 145


@settings(max_examples=200)
@given(st.lists(st.lists(st.sampled_from([(1,) * 9, (2,) * 16, (3,) * 20, (4,), (5,)]), max_size=5), max_size=7))
def test_a_tree_holds_every_row_once_and_in_order(pieces: list[list[tuple[int, ...]]]) -> None:
    from srlm_core.engines.packed import tree

    sequences = [[token for piece in row for token in piece] for row in pieces]
    stretches = tree(sequences)
    for number, row in enumerate(sequences):
        path = [stretch for stretch in stretches if number in stretch.rows]
        assert [token for stretch in path for token in stretch.ids] == row
        assert [stretch.start for stretch in path] == [0, *accumulate(len(stretch.ids) for stretch in path)][
            : len(path)
        ]
        for depth, stretch in enumerate(path):
            assert [stretches[above] for above in stretch.above] == path[:depth]
    assert all(stretch.ids for stretch in stretches)


def test_a_model_with_windows_is_left_as_it_is() -> None:
    from srlm_core.engines.packed import pack

    assert not pack(model(sliding_window=64))


def test_left_padding_and_generation_go_the_plain_way() -> None:
    ids, mask = batch(rows())
    ours, plain = packed().eval(), model().eval()
    states = [net.model(ids.flip(1), attention_mask=mask.flip(1)).last_hidden_state for net in (ours, plain)]
    torch.testing.assert_close(*(each[mask.flip(1).bool()] for each in states))
    asked = {"input_ids": ids[:2, :95], "attention_mask": mask[:2, :95], "max_new_tokens": 4, "do_sample": False}
    assert ours.generate(**asked).tolist() == plain.generate(**asked).tolist()
