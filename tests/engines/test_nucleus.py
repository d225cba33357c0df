"""The nucleus without a sort is the nucleus by its definition, and draws follow it."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from srlm_core.engines.nucleus import LOOKED_AT, Drawing, NucleusProcessor, draw, nuclei, uniform  # noqa: E402
from srlm_core.engines.vllm import EXTRA  # noqa: E402

pytestmark = pytest.mark.engine

DRAWS = 20_000


def by_definition(row, p: float) -> set[int]:
    """Sort the whole row; keep tokens while what came before has less than p."""
    order = row.sort(descending=True)
    before = order.values.cumsum(-1) - order.values
    return {token for i, token in enumerate(order.indices.tolist()) if i == 0 or p == 1 or before[i] < p}


def found(probabilities, top_p) -> list[dict[int, float]]:
    """Each row's nucleus: token to probability."""
    rows: list[dict[int, float]] = [{} for _ in probabilities]
    for nucleus in nuclei(probabilities, top_p):
        for row, tokens, shares in zip(*(part.tolist() for part in nucleus), strict=True):
            assert not rows[row], "a row is found once"
            rows[row] = {token: share for token, share in zip(tokens, shares, strict=True) if share}
    return rows


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("peak", [0.3, 2.0, 8.0])
def test_the_kept_set_is_the_one_of_the_definition(p, peak):
    logits = torch.randn(12, 5000, generator=torch.Generator().manual_seed(int(peak * 10))) * peak
    probabilities = logits.softmax(-1)
    for row, ours in zip(probabilities, found(probabilities, torch.full((12,), p)), strict=True):
        assert set(ours) == by_definition(row, p)
        assert ours == {token: row[token].item() for token in ours}


def test_rows_of_small_middling_and_large_nuclei_mix_in_one_batch():
    flat, peaked, middling = torch.linspace(0, 0.1, 3000), torch.zeros(3000), torch.full((3000,), -30.0)
    peaked[17], middling[:200] = 50.0, 0.0
    rows = torch.stack([flat, peaked, middling, flat]).softmax(-1)
    sizes = [len(row) for row in found(rows, torch.tensor([0.9, 0.9, 0.9, 0.5]))]
    assert sizes[1] == 1
    assert LOOKED_AT[0] < sizes[2] == 180 < LOOKED_AT[1]
    assert LOOKED_AT[1] < sizes[3] < sizes[0]


def test_a_vocabulary_smaller_than_the_tokens_looked_at_works():
    assert found(torch.tensor([[0.1, 0.8, 0.1]]), torch.tensor([0.5])) == [{1: pytest.approx(0.8)}]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("p", "vocabulary"), [(0.3, 40), (0.9, 40), (0.9, 3000), (1.0, 40)])
def test_draws_follow_the_probabilities_of_the_nucleus(temperature, p, vocabulary):
    """The distribution is the one after a full sort: renormalised inside the nucleus, nothing outside."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5)) * 2
    probabilities = (logits / temperature).softmax(-1)
    inside = torch.tensor(sorted(by_definition(probabilities, p)))
    wanted = torch.zeros(vocabulary).index_put((inside,), probabilities[inside] / probabilities[inside].sum())
    # A stretch at a time: the rows are copies
    numbers = torch.linspace(0, 1, DRAWS + 1)[:-1].split(1000)
    drawn = torch.cat([
        draw(logits.repeat(len(part), 1), torch.full((len(part),), temperature), torch.full((len(part),), p), part)
        for part in numbers
    ])  # fmt: skip
    share = torch.bincount(drawn, minlength=vocabulary) / DRAWS
    torch.testing.assert_close(share, wanted, rtol=0, atol=2 / DRAWS)


def test_the_largest_number_draws_the_last_token_of_the_nucleus():
    logits = torch.tensor([[3.0, 2.0, 1.0, -50.0]])
    assert draw(logits, torch.ones(1), torch.tensor([0.99]), torch.tensor([1.0])).item() == 2


def test_the_numbers_are_even_and_depend_on_seed_and_position():
    numbers = torch.tensor([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert len(set(numbers.tolist())) > 9_990
    assert numbers.min() >= 0
    assert numbers.max() < 1
    tenths = torch.histc(numbers, 10, 0, 1)
    # Chi-square with 9 degrees of freedom: 27.9 is its 0.999 quantile
    assert ((tenths - 1000) ** 2 / 1000).sum() < 27.9
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)


def test_in_a_batch_only_the_requests_that_ask_for_a_nucleus_get_one():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(3, 1)
    processor = NucleusProcessor(None, torch.device("cpu"), False)
    processor._rows = {0: Drawing(1.0, 0.4, 7, []), 2: Drawing(1.0, 0.9, 7, [])}
    made = processor.apply(logits.clone())
    assert made[0].argmax() == 0
    assert made[0, 0] == made[2].max() == torch.inf
    assert torch.equal(made[1], logits[1])


def test_a_row_draws_the_same_whatever_is_beside_it_and_goes_on_where_it_stood():
    """Also after vLLM moved it, or put it off and took it up again with what it had said."""
    pytest.importorskip("vllm")
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    asked = SimpleNamespace(extra_args={EXTRA: {"temperature": 1.0, "top_p": 0.9, "seed": 11}})
    alone, among = (NucleusProcessor(None, torch.device("cpu"), False) for _ in range(2))
    said: list[int] = []
    alone.update_state(BatchUpdate(1, [], [(0, asked, [], said)], []))
    among.update_state(BatchUpdate(3, [], [(i, asked, [], said) for i in (0, 2)], []))
    for step in range(5):
        row = logits[2].clone() * (step + 1)
        token = alone.apply(row.clone()[None]).argmax(-1).item()
        batch = logits.clone()
        batch[2] = row
        assert among.apply(batch)[2].argmax().item() == token
        said.append(token)
    assert len(set(said)) > 1
    among.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    resumed = NucleusProcessor(None, torch.device("cpu"), False)
    resumed.update_state(BatchUpdate(1, [], [(0, asked, [], list(said))], []))
    drawn = [made.apply(logits[2:].clone()).argmax().item() for made in (alone, resumed)]
    assert drawn[0] == drawn[1] == among.apply(logits[[2, 1]].clone())[0].argmax().item()
