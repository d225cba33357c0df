"""What is said of simulated campaigns follows from their numbers."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.looking import simulated
from srlm_core import simulation as sim
from srlm_core import simulation_report as report
from srlm_core.errors import ConfigError, StoreError

PLAIN = {"length": 1.0, "quality": 2.5, "judge_error": 0.3, "judge_bias": 0.0, "judge_fresh": 1.0, "drift": 1.0}


def made_up(flaw, **of):
    """Ends of all arms over four seeds: PLAIN with a spread, and `of` (arm__measure) where the flaw has a strength."""
    rows = []
    for strength, arm, seed in ((s, a, n) for s in sim.FLAWS[flaw].strengths for a in sim.ARMS for n in range(4)):
        row = {name: value + 0.01 * (seed - 1.5) for name, value in PLAIN.items()}
        row |= {m: of[f"{arm}__{m}"] + 0.01 * (seed - 1.5) for m in PLAIN if strength and f"{arm}__{m}" in of}
        where = {"assumption": "", "flaw": flaw, "strength": float(strength), "seed": seed, "arm": arm, "model": 5}
        rows.append({**dict.fromkeys(sim.MEASURES), **where, **row})
    return report.Ends(rows)


def told(flaw, question, **of):
    return next(answer for answer in report.answers(made_up(flaw, **of)) if question in answer.question)


def test_the_interval_by_worked_numbers():
    # s = 1, t(0.975, 2) = 4.3027: 2 -+ 4.3027 / sqrt(3)
    assert report.interval([1, 2, 3]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414, 3), abs=1e-4)
    assert report.interval([0.5, 0.5]) == (0.5, 0.5, 0.5, 2)
    assert str(report.interval([-1, -1.002])) == "−1.00 [−1.01, −0.99]"


def test_intervals_of_ninety_five_percent_hold_that_often():
    drawn = np.random.default_rng(0).standard_normal((4000, 5))
    found = [report.interval(of) for of in drawn]
    assert np.mean([of.low <= 0 <= of.high for of in found]) == pytest.approx(0.95, abs=0.012)


def test_differences_are_paired_by_seed():
    ends = made_up("length", self_rewarding_rho__length=0.8)
    gap = ends.gap("length", 0.7, ("self_rewarding_rho", "self_rewarding"), "length")
    assert gap == pytest.approx((-0.2, -0.2, -0.2, 4))  # the seeds' spread is in both
    assert ends.of("length", 0.7, "self_rewarding", "length").high > 1.01


def test_answers_follow_the_numbers():
    rho = "rho hold"
    assert told("length", rho).answer.startswith("It does not arise")
    inflates = {"self_rewarding__length": 2.0}
    assert told("length", rho, **inflates, self_rewarding_rho__length=1.0).answer.startswith("Yes: held at 0.35, 0.7")
    slowed = told("length", rho, **inflates, self_rewarding_rho__length=1.5)
    assert slowed.answer == "No: slowed at 0.35, 0.7, 1.4. The difference is −0.50 to −0.50."
    assert [finding.claim for finding in slowed.findings] == [None, False, False, False]
    assert "not held" in told("length", rho, **inflates, self_rewarding_rho__length=2.0).answer


def test_cream_must_keep_what_plain_loses_and_be_better_for_it():
    cream = "where self-rewarding does"
    falls = {"self_rewarding__quality": 2.0}
    assert told("noise", cream, cream__quality=2.0).answer.startswith("It does not arise")
    assert told("noise", cream, **falls).answer.startswith("Yes: kept")
    assert told("noise", cream, **falls, cream__quality=2.3).answer.startswith("No: lost less")
    assert told("noise", cream, **falls, cream__quality=1.9).answer.startswith("No: not kept")
    assert told("noise", "its own reward", cream_hard__quality=2.0).answer.startswith("Yes: kept")


def test_meta_judging_helps_harms_or_shows_nothing():
    for quality, said in ((2.6, "Yes: helps"), (2.4, "No: harms"), (2.5, "No: nothing to be shown")):
        assert told("leniency", "against leniency", meta_rewarding__quality=quality).answer.startswith(said)
        assert told("leniency", "without leniency", meta_rewarding__quality=quality).answer.startswith(said)


def test_a_page_has_plots_intervals_answers_and_its_data(tmp_path):
    _, page = simulated(["leniency", "position"], 2, tmp_path / "out")
    html, words = page.read_text(), (tmp_path / "out" / "simulation.md").read_text()
    assert html.count("<svg") == 2
    assert "Nan" not in html
    assert "nan" not in re.sub(r"finance|covenant", "", words)
    for text in (html, words):
        assert "How far this can be trusted" in text
        assert "against leniency?" in text
        assert "twice the step" in text
        assert "Does CREAM" not in text  # that flaw was not run
    rows = pq.read_table(tmp_path / "out" / "simulation.parquet")
    assert set(rows["arm"].to_pylist()) == set(sim.ARMS)
    assert set(rows["model"].to_pylist()) == {1, 2, 3, 4, 5}
    for always in ("length", "quality", "judge_error", "judge_fresh", "drift", "manner"):
        assert rows[always].null_count == 0
    _, again = simulated(["position", "leniency", "leniency"], 2, tmp_path / "again")
    assert again.read_text() == html
    assert pq.read_table(tmp_path / "again" / "simulation.parquet").equals(rows)


def test_the_command_prints_tables_answers_or_json(tmp_path):
    run = CliRunner().invoke
    shown = run(app, ["simulate", "--seeds", "2", "--flaw", "position", "--out", str(tmp_path)])
    assert shown.exit_code == 0
    assert "position bias: strength is points for being shown first" in shown.stdout
    assert "Does rho" not in shown.stdout
    as_json = run(app, ["simulate", "--seeds", "2", "--flaw", "length", "--out", str(tmp_path), "--json"])
    found = json.loads(as_json.stdout)
    assert found["answers"][0]["question"].startswith("Does rho")
    assert {"flaw", "strength", "arm", "measure", "mean", "low", "high", "n"} == set(found["ends"][0])


def test_wrong_values_are_refused_before_anything_is_run(tmp_path):
    with pytest.raises(ConfigError, match="expected a flaw of noise, length, position, leniency, self_preference, got"):
        simulated(["loudness"], 4, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="got the file"):
        simulated([], 4, tmp_path / "file")
    (tmp_path / "config.json").touch()
    with pytest.raises(StoreError, match="got the campaign"):
        simulated([], 4, tmp_path)
    assert CliRunner().invoke(app, ["simulate", "--seeds", "1"]).exit_code == 2  # one seed has no interval


def test_every_arm_has_a_look_or_gets_one_and_every_probe_is_an_arm():
    assert set(report._LOOKS) <= set(sim.ARMS)
    assert {arm for arms in report.PROBES.values() for arm in arms} <= set(sim.ARMS)
    assert set(report.PROBES) <= set(sim.FLAWS)
