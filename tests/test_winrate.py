import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from typer.testing import CliRunner

from flows.cli import app
from srlm_core import length_control, winrate
from srlm_core.errors import DataError

DATA = Path(__file__).parents[2] / "shared" / "data"
PRINTED = ("win_rate", "standard_error", "discrete_win_rate", "length_controlled_winrate")
PUBLISHED = pytest.mark.skipif(
    not (DATA / "alpaca_eval_annotations.csv.gz").exists(), reason="the published annotations are not here"
)


def games(*cells: tuple[int, int, int], model: str = "m") -> list[winrate.Verdict]:
    """Verdicts of one model: (how much longer it was, games, games it won)."""
    won = [(longer, float(game < its)) for longer, n, its in cells for game in range(n)]
    return [
        winrate.Verdict(model, f"i{number}", its, longer, 1000.0 + longer) for number, (longer, its) in enumerate(won)
    ]


@pytest.mark.parametrize(
    ("cells", "level"),
    [
        # theta = ln(3) / 2: the mean of the cells' log-odds, ln 3 and 0
        (((400, 4, 3), (-400, 4, 2)), 0.633975),
        # theta = ln(2) / 2
        (((400, 6, 4), (-400, 2, 1)), 0.585786),
    ],
)
def test_the_rate_at_equal_length_as_worked_by_hand(cells, level):
    found = winrate.win_rates(games(*cells))["m"]
    assert found.win_rate == pytest.approx(62.5)
    assert found.length_controlled_win_rate == pytest.approx(100 * level, abs=1e-3)


def test_a_weighted_verdict_counts_by_its_weight_and_a_discrete_one_does_not():
    rows = [one._replace(won=won) for one, won in zip(games((0, 4, 0)), (0.9, 0.6, 0.5, 0.2), strict=True)]
    found = winrate.win_rates(rows)["m"]
    assert found.win_rate == pytest.approx(100 * (0.9 + 0.6 + 0.5 + 0.2) / 4)
    assert (found.wins, found.draws, found.losses) == (2, 1, 1)
    assert found.discrete_win_rate == pytest.approx(62.5)
    # deviations .35, .05, -.05, -.35 from .55: sqrt(.25 / 3) / 2
    assert found.win_rate_stderr == pytest.approx(100 * 0.144338, abs=1e-3)


def test_a_model_that_wins_or_loses_all_is_that_at_any_length():
    rows = games((400, 3, 3), (10, 3, 3)) + games((400, 3, 0), (10, 3, 0), model="n")
    found = winrate.win_rates(rows)
    assert found["m"].length_controlled_win_rate == 100
    assert found["n"].length_controlled_win_rate == 0


def test_where_length_tells_wins_from_losses_without_an_error_no_rate_is_made_up():
    found = winrate.win_rates(games((400, 5, 5), (-400, 5, 0)))["m"]
    assert found.win_rate == 50
    assert found.length_controlled_win_rate is None
    assert found.length_controlled_win_rate_stderr is None


def test_the_error_of_the_fit_is_that_of_resampling():
    found = winrate.win_rates(games((400, 90, 60), (-400, 70, 30), (50, 80, 35)))["m"]
    rows = games((400, 90, 60), (-400, 70, 30), (50, 80, 35))
    rng = np.random.default_rng(0)
    drawn = [
        [rows[i]._replace(instruction=str(n)) for n, i in enumerate(rng.integers(0, 240, 240))] for _ in range(300)
    ]
    again = [winrate.win_rates(sample)["m"].length_controlled_win_rate for sample in drawn]
    assert found.length_controlled_win_rate_stderr == pytest.approx(np.std(again), rel=0.15)


def test_the_error_without_any_pull_of_length_is_that_of_a_mean():
    """Of ten games at each length six are won: the deviation is sqrt(.6 .4), over 20 games."""
    found = winrate.win_rates(games((400, 10, 6), (-400, 10, 6)))["m"]
    assert found.length_controlled_win_rate == pytest.approx(60)
    assert found.length_controlled_win_rate_stderr == pytest.approx(100 * (0.6 * 0.4 / 20) ** 0.5, abs=1e-3)


@given(st.integers(0, 2**31), st.floats(-2, 2))
def test_where_length_decides_nothing_control_changes_little(seed, theta):
    rng = np.random.default_rng(seed)
    won = (rng.random(600) < 1 / (1 + np.exp(-theta))).astype(float)
    features = np.column_stack([np.tanh(rng.normal(size=600)), np.zeros(600)])
    assert length_control.at_equal_length(features, won)[0] == pytest.approx(won.mean(), abs=0.03)


def test_how_easy_an_instruction_is_say_the_other_models_alone():
    own = games((0, 4, 2))
    won = {"i0": [1.0, 0.0], "i1": [1.0, 0.2], "i2": [0.0], "i3": [0.0, 1.0, 0.5]}  # its own result first
    assert winrate.others_on(own, won) == {"i0": 0.0, "i1": pytest.approx(0.2), "i3": 0.75}


def test_what_is_known_of_instructions_is_standardised_and_what_is_not_is_the_mean():
    own = games((0, 4, 2))
    assert winrate.standardised(own, {"i0": 3.0, "i1": 1.0}).tolist() == [1, -1, 0, 0]
    assert winrate.standardised(own, {}).tolist() == [0, 0, 0, 0]
    assert winrate.standardised(own, {"i0": 3.0}).tolist() == [0, 0, 0, 0]


def test_difficulties_that_are_given_are_used():
    rows = games((400, 4, 3), (-400, 4, 2))
    hard = {f"i{number}": float(number % 3) for number in range(8)}
    with_them = winrate.win_rates(rows, difficulties=hard)["m"].length_controlled_win_rate
    assert with_them != pytest.approx(63.3975, abs=0.01)  # without any, see above


def test_difficulties_are_the_second_column_whatever_it_is_called(tmp_path):
    path = tmp_path / "instruction_difficulty.csv"
    path.write_text(",instruction_difficulty\n0,0.5\n1,-1.25\n2,\n")
    assert winrate.read_difficulties(path) == {"0": 0.5, "1": -1.25}
    path.write_text("a\n1\n")
    with pytest.raises(DataError, match="first two columns"):
        winrate.read_difficulties(path)


def written(path, rows, **changed):
    told = {"generator_1": "base", "generator_2": "m", "output_1": "x" * 10, "output_2": "y" * 30, "preference": 2.0}
    full = [{**told, "instruction": f"i{number}", **row} for number, row in enumerate(rows)]
    path.write_text(json.dumps(full))
    return path


def test_annotations_in_the_official_tools_own_form_are_read(tmp_path):
    found = winrate.read(written(tmp_path / "annotations.json", [{}, {"preference": 1.25}, {"preference": 0}]))
    assert found.baseline == "base"
    assert [verdict.won for verdict in found.verdicts] == [1.0, 0.25, 0.5]
    assert {(verdict.longer, verdict.length) for verdict in found.verdicts} == {(20.0, 30.0)}
    assert found.set_aside == {}


def test_the_command_prints_rates_for_people_and_for_programs(tmp_path):
    path = written(tmp_path / "annotations.json", [{}, {"preference": 1.25}, {"preference": 9}])
    runner = CliRunner()
    said = runner.invoke(app, ["winrate", str(path)])
    assert said.exit_code == 0
    assert "Against base" in said.output
    assert "1 row(s) set aside: preference is no number from 1 to 2." in said.output
    told = json.loads(runner.invoke(app, ["winrate", str(path), "--json"]).output)
    assert told["models"]["m"]["win_rate"] == pytest.approx(62.5)
    assert told["models"]["m"]["n"] == 2


def test_what_cannot_be_used_is_counted_and_never_becomes_a_verdict(tmp_path):
    rows = [{}, {"preference": None}, {"preference": 7}, {"instruction": "i0"}, {"generator_2": None}]
    found = winrate.read(written(tmp_path / "annotations.json", rows))
    assert len(found.verdicts) == 1
    assert found.set_aside == {
        "preference is no number from 1 to 2": 2,
        "a second annotation of the same answer": 1,
        "no model or no instruction": 1,
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "expected a column model or generator_2"),
        ("", "expected annotations as CSV"),
        ("model,instruction,preference\n", "got no row"),
        ("model,instruction,preference\nm,1,none\n", "no row that can be used"),
        ("model,instruction,preference,generator_1\nm,1,2,a\nm,2,2,b\n", "expected one baseline"),
    ],
)
def test_a_file_of_another_kind_says_what_was_expected(tmp_path, text, told):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=told):
        winrate.read(path)


def test_json_of_another_kind_says_what_was_expected(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"m": 1}')
    with pytest.raises(DataError, match="no list of objects"):
        winrate.read(path)


def test_rows_need_not_all_have_every_field(tmp_path):
    path = tmp_path / "a.json"
    told = {"model": "m", "instruction": "007", "preference": 2}
    path.write_text(json.dumps([{"model": "m", "instruction": "1"}, told]))
    found = winrate.read(path)
    assert [verdict.instruction for verdict in found.verdicts] == ["007"]
    assert found.set_aside == {"preference is no number from 1 to 2": 1}


def test_without_lengths_there_is_no_controlled_rate(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("model,instruction,preference\nm,1,2\nm,2,1\n")
    found = winrate.win_rates(winrate.read(path).verdicts)["m"]
    assert found.win_rate == 50
    assert found.length_controlled_win_rate is None


@PUBLISHED
def test_published_annotations_give_the_published_rates():
    found = winrate.win_rates(winrate.read(DATA / "alpaca_eval_annotations.csv.gz").verdicts)
    with (DATA / "alpaca_eval_leaderboard.csv").open() as file:
        board = {row[""]: {name: float(row[name] or "nan") for name in PRINTED} for row in csv.DictReader(file)}
    assert found.keys() == board.keys()
    for model, printed in board.items():
        assert found[model].win_rate == pytest.approx(printed["win_rate"], abs=0.01)
        assert found[model].win_rate_stderr == pytest.approx(printed["standard_error"], abs=0.01)
        assert found[model].discrete_win_rate == pytest.approx(printed["discrete_win_rate"], abs=0.01)
    ours = np.array([rate.length_controlled_win_rate for rate in found.values()], dtype=float)
    theirs = np.array([board[model]["length_controlled_winrate"] for model in found])
    assert np.abs(ours - theirs).mean() <= 3.0
    correlation: Any = spearmanr(ours, theirs)
    assert correlation.statistic >= 0.97
