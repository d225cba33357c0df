"""Sharing a batch's beginnings changes how long a pass takes, and nothing that it computes."""

from typing import Any

import pytest

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")

RUBRIC = list(range(100, 190))
"""90 tokens that many rows begin with."""


def rows() -> list[list[int]]:
    """Four rows of one rubric, of two lengths; two of another; one alone; one shorter than any rubric."""
    alike = [RUBRIC + list(range(start, start + size)) for start, size in ((10, 20), (11, 5), (300, 5), (10, 3))]
    others = [list(range(400, 470)) + [7] * size for size in (1, 30)]
    return [*alike, *others, list(range(900, 1000)), [5, 6, 7]]


def batch(sequences: list[list[int]]) -> tuple[Any, Any]:
    width = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    return ids, mask


def model(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, **settings)).train()


def pass_through(net: Any, ids: Any, mask: Any) -> tuple[Any, dict[str, Any]]:
    """Hidden states where there are tokens, and the gradients of a loss on them."""
    net.zero_grad()
    states = net.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return states.detach(), {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def test_states_and_gradients_are_those_of_the_plain_pass() -> None:
    from srlm_core.engines.shared_prefix import share_prefixes

    ids, mask = batch(rows())
    states, gradients = pass_through(model(), ids, mask)
    sharing = model()
    assert share_prefixes(sharing)
    shared_states, shared_gradients = pass_through(sharing, ids, mask)
    torch.testing.assert_close(shared_states, states, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-3)


def test_what_rows_share_is_computed_once() -> None:
    from srlm_core.engines.shared_prefix import share_prefixes

    ids, mask = batch(rows())
    net, seen = model(), []
    net.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    share_prefixes(net)
    net.model(input_ids=ids, attention_mask=mask)
    # the rubric once, four rests as wide as the longest; the other beginning once, two rests; the singles as they are
    assert sum(seen) == (90 + 4 * 20) + (70 + 2 * 30) + 2 * 100
    assert ids.numel() == 8 * 110


def test_rows_are_grouped_by_how_they_begin() -> None:
    from srlm_core.engines.shared_prefix import alike, common_prefix

    ids, mask = batch(rows())
    assert alike(ids, mask.sum(1)) == [[0, 1, 2, 3], [4, 5], [6], [7]]
    assert common_prefix(ids[:4], 93) == 90
    assert common_prefix(ids[[0, 0]], 110) == 109  # equal rows keep a token each


def test_a_model_with_windows_is_left_as_it_is() -> None:
    from srlm_core.engines.shared_prefix import share_prefixes

    assert not share_prefixes(model(sliding_window=64))


def test_left_padding_and_generation_go_the_plain_way() -> None:
    from srlm_core.engines.shared_prefix import share_prefixes

    ids, mask = batch(rows())
    sharing, plain = model().eval(), model().eval()
    share_prefixes(sharing)
    ours, theirs = (net.model(ids.flip(1), attention_mask=mask.flip(1)).last_hidden_state for net in (sharing, plain))
    torch.testing.assert_close(ours[mask.flip(1).bool()], theirs[mask.flip(1).bool()])
    asked = {"input_ids": ids[:2, :95], "attention_mask": mask[:2, :95], "max_new_tokens": 4, "do_sample": False}
    assert sharing.generate(**asked).tolist() == plain.generate(**asked).tolist()
