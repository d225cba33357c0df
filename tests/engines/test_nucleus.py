"""The nucleus without a sort is the nucleus by its definition."""

import pytest

torch = pytest.importorskip("torch")
from srlm_core.engines.nucleus import BEST, NucleusProcessor, draw, keep_nucleus  # noqa: E402

pytestmark = pytest.mark.engine


def by_definition(row, p: float) -> set[int]:
    """Sort the whole row; keep tokens while what came before has less than p."""
    order = row.sort(descending=True)
    probabilities = (order.values - row.logsumexp(-1)).exp()
    before = probabilities.cumsum(-1) - probabilities
    return {token for i, token in enumerate(order.indices.tolist()) if i == 0 or p == 1 or before[i] < p}


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("peak", [0.3, 2.0, 8.0])
def test_the_kept_set_is_the_one_of_the_definition(p, peak):
    logits = torch.randn(12, 5000, generator=torch.Generator().manual_seed(int(peak * 10))) * peak
    kept = keep_nucleus(logits.clone(), torch.full((12,), p))
    for row, ours in zip(logits, kept, strict=True):
        found = set(ours.isfinite().nonzero().squeeze(-1).tolist())
        assert found == by_definition(row, p)
        assert torch.equal(ours[list(found)], row[list(found)])


def test_rows_inside_and_outside_the_best_tokens_mix_in_one_batch():
    flat, peaked = torch.zeros(3000), torch.zeros(3000)
    flat += torch.linspace(0, 0.1, 3000)
    peaked[17] = 50.0
    kept = keep_nucleus(torch.stack([flat, peaked, flat]), torch.tensor([0.9, 0.9, 0.5])).isfinite().sum(-1).tolist()
    assert kept[0] > BEST
    assert kept[1] == 1
    assert kept[0] > kept[2] > BEST


def test_a_vocabulary_smaller_than_the_best_tokens_works():
    assert keep_nucleus(torch.tensor([[0.0, 10.0, 0.0]]), torch.tensor([0.5])).isfinite().tolist() == [
        [False, True, False]
    ]


def test_draws_follow_the_probabilities_of_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(10_000, 1)
    drawn = draw(logits, torch.full((10_000,), 0.8), torch.linspace(0, 1, 10_001)[:-1])
    share = torch.bincount(drawn, minlength=4) / 10_000
    assert share.tolist() == pytest.approx([0.5 / 0.8, 0.3 / 0.8, 0, 0], abs=1e-3)


def test_the_largest_number_draws_the_last_token_of_the_nucleus():
    almost_one = torch.tensor([1 - 2**-24])
    assert draw(torch.tensor([[3.0, 2.0, 1.0, -50.0]]), torch.tensor([0.99]), almost_one).item() == 2


def test_in_a_batch_only_the_requests_that_ask_for_a_nucleus_get_one():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(3, 1)
    processor = NucleusProcessor(None, torch.device("cpu"), False)
    processor._top_p = {0: 0.4, 2: 0.9}
    kept = processor.apply(logits.clone())
    assert kept.isfinite().tolist() == [[True, False, False, False], [True] * 4, [True, True, True, False]]
    assert torch.equal(kept[1], logits[1])


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_what_is_drawn_from_the_kept_logits_follows_the_definition(p):
    """The distribution after ours is the one after a full sort: renormalised inside the nucleus, 0 outside."""
    logits = torch.randn(6, 4000, generator=torch.Generator().manual_seed(5)) * 4
    for row, ours in zip(logits, keep_nucleus(logits.clone(), torch.full((6,), p)).softmax(-1), strict=True):
        inside = torch.tensor(sorted(by_definition(row, p)))
        wanted = torch.zeros(4000).index_put((inside,), row[inside].softmax(-1))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)
