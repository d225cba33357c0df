"""Methods over seeds: the error of both parts, what was spent, what is one row."""

import math

import made_up
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_core import standings, store
from srlm_core.rates import Rate

VALUES = st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(0, 0.5)), min_size=1, max_size=6)


def test_the_error_holds_the_spread_of_seeds_and_the_error_within_one():
    # s = 0.1, 0.01 / 3 between; (9 + 16 + 25) e-4 / 3 within
    found = standings.pooled([(0.5, 0.03), (0.6, 0.04), (0.7, 0.05)])
    assert found == (pytest.approx(0.6), pytest.approx(math.sqrt(0.01 / 3 + 0.005 / 3)), 3)


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ([(0.5, 0.03)], Rate(0.5, 0.03, 1)),  # one seed: the error within it
        ([(40.0, None)], Rate(40.0, None, 1)),
        ([(40.0, None), (44.0, None)], Rate(42.0, 2.0, 2)),  # s = 2.83, / sqrt 2
        ([(0.5, 0.0), (0.5, 0.0)], Rate(0.5, None, 2)),  # equal values say nothing of the next one
        ([(0.5, 0.03), (None, None)], Rate(0.5, 0.03, 1)),
        ([], Rate(None, None, 0)),
    ],
)
def test_what_is_not_known_is_null_and_in_no_number(seeds, told):
    assert standings.pooled(seeds) == pytest.approx(told)


@given(VALUES)
def test_the_error_is_never_smaller_than_that_within_a_seed_nor_than_that_between_them(seeds):
    found = standings.pooled(seeds)
    within = [error**2 for _, error in seeds if error is not None]
    assert min(value for value, _ in seeds) - 1e-9 <= found.value <= max(value for value, _ in seeds) + 1e-9
    if within:
        assert (found.stderr or 0) >= math.sqrt(math.fsum(within) / len(within)) - 1e-9
    assert standings.pooled(reversed(seeds)).stderr == pytest.approx(found.stderr)


def test_what_differs_in_the_seed_alone_is_one_row_and_a_copy_is_none(tmp_path):
    folders = [
        made_up.campaign(tmp_path, name="a", seed=1), made_up.campaign(tmp_path, name="b", seed=0),
        made_up.campaign(tmp_path, name="wider", pairs={"min_margin": 1.0}), made_up.campaign(tmp_path, name="copy"),
    ]  # fmt: skip
    rows = standings.rows(folders)
    assert [[one.folder.name for one in row.campaigns] for row in rows] == [["b", "a"], ["wider"], ["copy"]]
    told = standings.as_dicts(rows)[0]
    assert told["seeds"] == [0, 1]
    assert told["points"] == {"value": pytest.approx(0.5), "stderr": pytest.approx(0.04), "n": 2}
    assert told["judge_accuracy"]["value"] == pytest.approx(0.7)
    assert any("n seeds = 1 (wider, copy)" in line for line in standings.caveats(rows))


def test_tokens_are_those_that_the_parts_name_and_unknown_where_one_does_not(tmp_path):
    folder = made_up.campaign(tmp_path)
    (row,) = standings.rows([folder])
    assert row.tokens() == Rate(None, None, 0)  # made by an earlier version
    for dataset, each in (("prompts", 5), ("responses", 40), ("judgments", 100), ("pairs", 0)):
        for path in store.parts(folder / "iter_01" / dataset):
            store.write_part(path, store.read_part(path), "f", {"passes": 3, "tokens": each})
    (row,) = standings.rows([folder])
    spent = row.first.spent
    assert (spent.prompts, spent.answering, spent.judging) == (10, 80, 200)  # two shards
    assert spent.by_iteration == (0, 290)
    assert standings.as_dicts([row])[0]["tokens_of_the_first"] == 1


def test_every_cell_of_a_campaign_that_has_not_begun_is_a_dash(tmp_path):
    whole, empty = made_up.campaign(tmp_path), tmp_path / "empty"
    store.write_json(empty / "config.json", made_up.config(seed=7, iterations=3).model_dump(mode="json"))
    rows = standings.rows([whole, empty])
    assert standings.grid(rows)[2] == ["empty M4", "1", *["–"] * 11]
    assert "empty is not finished" in standings.as_text(rows)
