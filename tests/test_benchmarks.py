"""The arithmetic of the benchmarks, and that each of them is there."""

import importlib
import math

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import sampling, training
from benchmarks.__main__ import BENCHMARKS
from benchmarks.likeness import distances, dpo_loss, token_loss
from benchmarks.loop import distinct
from benchmarks.sides import Comparison, Side, add_rounds, in_turn, machine, require_alike
from benchmarks.similarity import candidates, indexed, plain
from srlm_core.similarity import rouge_l


def made(**given: object) -> Comparison:
    words = {"name": "x", "ours_is": "a", "theirs_is": "b", "unit": "s", "want": "at most", "aim": 0.8}
    return Comparison(**{**words, **given})  # type: ignore[arg-type]


def test_the_ratio_is_the_median_over_the_rounds_and_not_the_ratio_of_medians() -> None:
    found = made(ours=[1.0, 2.0, 9.0], theirs=[2.0, 8.0, 10.0])
    assert found.ratios == [0.5, 0.25, 0.9]
    assert found.ratio == 0.5
    assert found.reached
    assert found.as_dict()["ratio_spread"] == [0.25, 0.9]


def test_a_rate_wants_to_be_high_and_a_time_low() -> None:
    assert not made(ours=[9.0], theirs=[10.0]).reached
    assert made(ours=[9.0], theirs=[10.0], want="at least", unit="tok/s").reached
    assert made(ours=[8.0], theirs=[9.0], limit=2.0).share_of_limit == 0.25
    assert made(ours=[8.0], theirs=[9.0], limit=32.0, unit="tok/s").share_of_limit == 0.25
    assert made(ours=[8.0], theirs=[9.0]).share_of_limit is None


def test_the_sides_run_in_turn_and_take_turns_to_begin() -> None:
    order: list[str] = []

    def side(name: str, takes: float) -> Side:
        return lambda r: order.append(f"{name}{r}") or takes

    first, second = made(), made()
    in_turn(side("a", 1), [(first, side("b", 2)), (second, side("c", 4))], 3)
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert (first.ratios, second.ratios) == ([0.5] * 3, [0.25] * 3)
    order.clear()
    in_turn(side("a", 1), [(made(), side("b", 2))], 2, ours_first=True)
    assert order == ["a0", "b0", "a1", "b1"]


def test_more_rounds_are_added_to_those_of_the_same_machine_versions_and_sizes_alone() -> None:
    earlier = made(ours=[1.0], theirs=[4.0], also={"tokens": [5]}).as_dict()
    found = [made(ours=[2.0], theirs=[4.0], also={"tokens": [6]}), made(theirs_is="c", ours=[3.0], theirs=[4.0])]
    add_rounds([earlier], found)
    assert [one.ours for one in found] == [[1.0, 2.0], [3.0]]
    assert (found[0].theirs, found[0].also) == ([4.0, 4.0], {"tokens": [5, 6]})
    told = {"machine": machine(), "settings": {"rows": 3}}
    require_alike(told, {"rows": 3})
    with pytest.raises(SystemExit, match=r"expected rows .* 3, got 4"):
        require_alike(told, {"rows": 4})
    with pytest.raises(SystemExit, match="cores"):
        require_alike({**told, "machine": {**told["machine"], "cores": 99}}, {"rows": 3})


def test_the_loss_afterwards_is_the_methods_own() -> None:
    assert token_loss({"0/completion": (-3.0, 2), "1/completion": (-1.0, 2)}) == 1.0
    start = {"0/chosen": (-5.0, 3), "0/rejected": (-4.0, 3)}
    assert dpo_loss(start, start, 0.1) == pytest.approx(math.log(2))
    # the chosen one gains 6, the rejected one loses 4: log(1 + exp(-0.1 x 10))
    after = {"0/chosen": (1.0, 3), "0/rejected": (-8.0, 3)}
    assert dpo_loss(after, start, 0.1) == pytest.approx(math.log1p(math.exp(-1.0)))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_sizes_for_both_machines(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert set(module.SIZES) == {"cpu", "gpu"}
    assert callable(module.compare)


def test_the_filter_decides_as_the_definition_does_on_texts_like_a_models() -> None:
    texts = candidates(300, seed=3)
    assert indexed(texts) == plain(texts)
    assert 0 < sum(indexed(texts)) < 300


def test_the_loops_prompts_pass_the_filter() -> None:
    texts = distinct(60)
    assert max(rouge_l(a, b) for i, a in enumerate(texts) for b in texts[:i]) <= 0.7


def test_weights_apart_are_shares_of_the_way_from_the_start(tmp_path):
    ends = {"start": [0.0, 0.0], "ours, seed 0": [1.0, 1.0], "theirs, seed 0": [1.0, 0.0], "theirs, seed 1": [0.0, 1.0]}
    for name, weights in ends.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(weights)}, tmp_path / name / "model.safetensors")
    # theirs went 1 on average; ours lies 1 from each of them, they lie the root of 2 apart
    assert distances({name: tmp_path / name for name in ends}) == {
        "ours to theirs": {"mean": 1.0, "lowest": 1.0, "highest": 1.0, "n": 2},
        "theirs, two seeds": {"mean": 1.414, "lowest": 1.414, "highest": 1.414, "n": 1},
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_step_of_all_rows_ends_where_trl_as_it_comes_ends(kind, tmp_path):
    # where a step takes all rows there, no draw of rows differs: what is left are Adam's signs of gradients near zero
    also = training.side_by_side(kind, training.Size(8, 8, 8, 4, 512), 1, tmp_path / kind, "float32").also
    assert also["weights apart, as shares of the way"]["ours to theirs"]["mean"] < 0.1
    losses = also["losses afterwards, all rows"]
    assert losses["ours, seed 0"] == pytest.approx(losses["theirs, seed 0"], abs=2e-3)
    assert losses["ours, seed 0"] < losses["start"] - 0.05


@pytest.mark.slow
def test_the_loop_and_a_bare_engine_are_given_the_same_requests():
    (made,) = sampling.compare(sampling.Size(2, 2, 2, 16, 16, 2, 16), 2)  # the second round is an iteration after M1's
    assert len(made.ours) == len(made.theirs) == 2
    assert all(tokens > 0 for tokens in [*made.also["tokens generated, bare"], *made.also["responses' tokens, ours"]])
