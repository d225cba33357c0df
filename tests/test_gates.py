"""Gates: numbers worked by hand, what is not known, a campaign that each of them stops, and a person's decisions."""

import hashlib
import math
from pathlib import Path

import made_up
import pyarrow as pa
import pytest

from srlm_core import approval, gates, recipes, settings, store
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError, StoppedByGate, StoppedByPerson, StoreError, WaitsForPerson
from srlm_core.gates import Gate, hold
from srlm_core.rates import Rate
from srlm_core.report import gather, write_report
from srlm_core.suites.capability import SCORES


def held(folder: Path, t: int = 1, win_rate: Rate = gates.UNKNOWN, **limits) -> dict[str, Gate]:
    config = made_up.config(gates=limits, evaluation={"suites": {"capability": ["arc", "gsm"]}}, iterations=2)
    return {gate.name: gate for gate in gates.measure(folder, t, config, win_rate)}


# --- measured -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "name", "value", "n", "passed"),
    [
        # 3 + 2 + 1 + 3 + 3 + 3 of 18 judgments could be read
        ({"min_readable_rate": 0.8}, "readable_rate", 15 / 18, 18, True),
        ({"min_readable_rate": 0.9}, "readable_rate", 15 / 18, 18, False),
        # of three prompts one gave a pair and one was a tie
        ({"max_tie_rate": 0.3}, "tie_rate", 1 / 3, 3, False),
        ({"max_tie_rate": 0.4}, "tie_rate", 1 / 3, 3, True),
        ({"min_pairs_yield": 0.4}, "pairs_yield", 1 / 3, 3, False),
    ],
)
def test_counts_of_an_iteration_are_held_as_they_are(tmp_path, limits, name, value, n, passed):
    gate = held(made_up.campaign(tmp_path), **limits)[name]
    assert (gate.value, gate.n, gate.passed, gate.note) == (pytest.approx(value), n, passed, "")


@pytest.mark.parametrize(
    ("setting", "found", "limit", "passed"),
    [
        ("min_win_rate", Rate(0.46, 0.03, 256), 0.5, True),  # 0.04 below, within 0.06
        ("min_win_rate", Rate(0.42, 0.03, 256), 0.5, False),  # 0.08 below
        ("min_win_rate", Rate(0.0, 0.0, 4), 0.5, True),  # four losses: 0.5 below, within 2 * 1/4
        ("min_win_rate", Rate(0.0, 0.0, 8), 0.5, False),
        ("min_win_rate", Rate(1.0, None, 1), 0.5, None),  # one answer decides nothing
        ("min_win_rate", Rate(None, None, 0), 0.5, None),
        ("max_length_growth", Rate(1.5, 0.2, 60), 1.2, True),
        ("max_length_growth", Rate(1.5, 0.1, 60), 1.2, False),
        ("max_capability_drop", Rate(3.0, 0.9, 400), 1.0, False),
        ("max_capability_drop", Rate(-3.0, 0.9, 400), 1.0, True),
        ("max_tie_rate", Rate(0.5, 0.1, 25), 0.5, True),  # a count at its limit keeps to it
        ("max_tie_rate", Rate(0.51, 0.1, 25), 0.5, False),
    ],
)
def test_samples_fail_past_two_standard_errors_and_counts_at_once(setting, found, limit, passed):
    gate = hold(setting, found, limit, "why not")
    assert gate.passed is passed
    assert bool(gate.note) == (passed is None)
    assert gate.setting == f"gates.{setting}"


def answers(folder: Path, model: str, tokens: list[int]) -> None:
    rows = pa.table({"prompt_id": [f"p{i}" for i in range(len(tokens))], "n_tokens": pa.array(tokens, pa.int32())})
    store.write_part(store.part_path(folder / "evaluation" / model / "responses", 0), rows, "f")


def test_length_growth_is_a_ratio_of_means_on_the_same_prompts(tmp_path):
    folder = made_up.campaign(tmp_path)
    answers(folder, "M1", [10, 20, 99])
    answers(folder, "M2", [20, 25])
    growth = gates.length_growth(folder, "M2")
    # 45 / 30 = 1.5; residuals 20 - 15 and 25 - 30: their error is sqrt((25 + 25) / 2 / 2) = 3.54, over a mean of 15
    assert growth == (pytest.approx(1.5), pytest.approx(math.sqrt(12.5) / 15), 2)
    assert held(folder, 2, max_length_growth=1.2)["length_growth"].passed is True
    assert held(folder, 1, max_length_growth=1.2)["length_growth"].note.startswith("M1 is the first")


def took(folder: Path, model: str, task: str, right: dict[str, float | None]) -> None:
    rows = [
        {"task": task, "doc": doc, "metric": metric, "value": value}
        for doc, value in right.items()
        for metric in ("acc", "acc_norm")
    ]
    path = store.part_path(folder / "evaluation" / model / f"capability_{task}", 0)
    store.write_part(path, pa.Table.from_pylist(rows, SCORES), "f")


def test_a_capability_drop_is_paired_by_question_and_a_mean_over_tasks(tmp_path):
    folder = made_up.campaign(tmp_path)
    took(folder, "M1", "arc", {"1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0})
    took(folder, "M2", "arc", {"1": 1.0, "2": 0.0, "3": 0.0, "4": 0.0, "5": 1.0})
    took(folder, "M1", "gsm", {"1": 1.0, "2": 0.0, "3": None})
    assert held(folder, 2, max_capability_drop=1)["capability_drop"].note == "not measured of both models"
    took(folder, "M2", "gsm", {"1": 1.0, "2": 0.0, "3": 1.0})
    # arc falls by 0, 1, 0, 1: a half, ± 0.25; gsm by 0, 0
    assert gates.capability_drop(folder, "M2", ("arc", "gsm")) == (25.0, 12.5, 6)


def test_what_was_measured_of_other_weights_is_not_measured(tmp_path):
    folder = made_up.campaign(tmp_path)
    for model in ("M1", "M2"):
        answers(folder, model, [10, 20, 30])
    made_up.results(folder, "M2", half=0.7, digest="of earlier weights")
    gate = held(folder, 2, max_length_growth=1.2)["length_growth"]
    assert (gate.value, gate.passed) == (None, None)


@pytest.mark.parametrize(
    ("own", "half", "passed"),
    [
        (1, 0.55, True),  # M2's scores are higher, its accuracy stays
        (1, 0.40, False),  # and its accuracy falls by 0.15, ± hypot(0.04, 0.04) = 0.057
        (1, 0.50, True),  # falls by 0.05: within the error
        (0, 0.40, True),  # its scores are the same
    ],
)
def test_goodhart_is_own_scores_up_and_agreement_with_people_down(tmp_path, monkeypatch, own, half, passed):
    folder = made_up.campaign(tmp_path)
    higher = {name: tuple(v and v + own for v in verdicts) for name, verdicts in made_up.VERDICTS.items()}
    monkeypatch.setattr(made_up, "VERDICTS", higher)
    made_up.write_iteration(folder, {}, t=2)
    made_up.results(folder, "M2", half=half)
    gate = held(folder, 2, goodhart=True)["goodhart"]
    assert gate.passed is passed
    assert gate.value == pytest.approx(half - 0.55)
    assert gate.stderr == pytest.approx(math.hypot(0.04, 0.04))


def test_goodhart_needs_two_iterations_and_both_numbers(tmp_path):
    folder = made_up.campaign(tmp_path)
    assert held(folder, 1, goodhart=True)["goodhart"].passed is None
    assert held(folder, 2, goodhart=True)["goodhart"].note == "its own scores: no change could be told"
    assert "last model" in held(folder, 3, goodhart=True)["goodhart"].note


def test_the_last_model_makes_no_data_and_that_is_said(tmp_path):
    gate = held(made_up.campaign(tmp_path), 3, max_tie_rate=0.9)["tie_rate"]
    assert (gate.value, gate.n, gate.passed) == (None, 0, None)
    assert gate.note == "M3 is the last model and makes no data"


def test_a_model_passes_where_one_gate_was_measured_and_none_failed():
    yes, no, unknown = (Gate("tie_rate", 0.1, 0.0, 9, 0.5, passed, "") for passed in (True, False, None))
    assert gates.verdict([yes, unknown]) is True
    assert gates.verdict([yes, no, unknown]) is False
    assert gates.verdict([unknown]) is None
    assert gates.verdict([]) is None


def test_the_words_name_what_failed_and_what_is_not_known():
    told = gates.in_words([
        Gate("readable_rate", 0.9, 0.01, 90, 0.8, True, ""),
        Gate("tie_rate", 0.62, 0.03, 64, 0.5, False, ""),
        Gate("win_rate", None, None, 0, 0.5, None, "M1 is the first"),
        Gate("goodhart", None, None, 0, None, None, "M1 is the first"),
    ])  # fmt: skip
    assert told == (
        "1 of 4 gates passed, 1 failed: tie_rate 0.62 ± 0.03 (n = 64), at most 0.5, "
        "2 not measured: win_rate, goodhart (M1 is the first)"
    )


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (['evaluation.models="none"', "gates.goodhart=true"], r"gates\.goodhart rests on what evaluation measures"),
        (['evaluation.models="none"', "gates.min_win_rate=0.5"], r"gates\.min_win_rate"),
        (["gates.max_capability_drop=2"], r"evaluation\.suites\.capability, which names no task"),
        (["gates.max_tie_rate=1.5"], r"gates\.max_tie_rate"),
        (["gates.tie_rate=0.5"], r"gates\.max_tie_rate"),
    ],
)
def test_a_gate_that_could_never_be_measured_is_refused(asked, told):
    with pytest.raises(ConfigError, match=told):
        recipes.load("smoke", overrides=asked)


def test_gates_change_no_row_and_a_campaign_from_before_them_goes_on():
    now = settings.flat(RunConfig())
    before = {name: value for name, value in now.items() if not name.startswith("gates.")}
    other = {**now, "gates.max_tie_rate": 0.5, "gates.stop": False}
    assert settings.changes(before, now) == settings.changes(now, other) == {}
    assert settings.changes(before, {**now, "responses.n": 8}) == {"responses.n": (4, 8)}


# --- in the loop ----------------------------------------------------------------------------------------------------


def parquet(folder: Path) -> dict[str, tuple[int, str]]:
    """What a campaign holds, by file, inode and content: a part made again is another file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*.parquet")
    }


HARD = ("judgments.k=1", "judgments.sampling.temperature=1.0", "evaluation.prompts=12", "prompts.target=8",
        "evaluation.attacks=false", "evaluation.refusals=false", "evaluation.own_groups=0")  # fmt: skip
COMMON = ("evaluation.attacks=false", "evaluation.refusals=false", "evaluation.own_groups=0", "prompts.target=8")


@pytest.mark.parametrize(
    ("gate", "t"),
    [
        ("min_readable_rate=1.0", 1),
        ("max_tie_rate=0.0", 2),
        ("min_pairs_yield=1.0", 2),
        ("max_length_growth=0.1", 2),
        ("min_win_rate=1.0", 2),
    ],
)
def test_each_gate_stops_before_the_training(scripted, tmp_path, gate, t):
    folder, told = tmp_path / "c", []
    with pytest.raises(StoppedByGate) as stopped:
        scripted(*HARD, f"gates.{gate}", observers=[lambda what, details: told.append(what)])
    name = gate.partition("=")[0]
    assert f"M{t} was expected to pass its gates before M{t + 1} is trained" in str(stopped.value)
    assert f"(gates.{name})" in str(stopped.value)
    assert told[-2:] == ["gate", "stopped"]
    assert not (folder / "models" / f"M{t + 1}").exists()
    kept = store.read_json(folder / f"iter_{t:02d}" / "gates.json")
    assert [(one["name"], one["passed"]) for one in kept["gates"]] == [(name.partition("_")[2], False)]


def test_a_stopped_campaign_goes_on_once_its_limit_is_changed_and_makes_nothing_again(scripted, tmp_path):
    folder, told = tmp_path / "c", []
    with pytest.raises(StoppedByGate):
        scripted(*HARD, "gates.min_readable_rate=1")
    before = parquet(folder)
    with pytest.raises(StoppedByGate):  # the same settings stop at the same place
        scripted(*HARD, "gates.min_readable_rate=1")
    assert parquet(folder) == before
    scripted(*HARD, "gates.min_readable_rate=0.01", "iterations=1")
    assert {path: parquet(folder)[path] for path in before} == before
    again = [*HARD, "gates.min_readable_rate=1", "gates.stop=false", "iterations=1"]
    scripted(*again, observers=[lambda what, details: told.append(what)])  # it is only told
    assert ("gate" in told, "stopped" in told, told[-1]) == (True, False, "finished")
    said = (write_report(folder).parent / "report.md").read_text().partition("### Gates")[2]
    assert "| M1 | readable\\_rate |" in said
    assert "| at least 1 | failed |" in said


def test_the_head_to_head_of_a_gate_is_the_one_of_the_end(scripted):
    """Asked in iteration 2 and at the end: one engine of M0 more, no part twice, the same bytes as without the gate."""
    with_gate, without = scripted(*COMMON, "gates.min_win_rate=0.1", name="a"), scripted(*COMMON, name="b")
    hashes = [{path: found[1] for path, found in parquet(folder).items()} for folder in (with_gate, without)]
    assert hashes[0] == hashes[1]
    started = [sorted((f / "logs" / "engine_starts.txt").read_text().split()) for f in (with_gate, without)]
    assert started == [["M0", "M0", "M1", "M2", "M3", "sft_baseline"], ["M0", "M1", "M2", "M3", "sft_baseline"]]
    kept = gates.read(with_gate)
    matches = store.read_json(with_gate / "evaluation" / "head_to_head" / "results.json")["comparisons"]
    for t in (2, 3):
        assert kept[t][0].value == matches[f"M{t}_vs_M{t - 1}"]["win_or_half_tie"]["value"]
    before = parquet(with_gate)
    scripted(*COMMON, "gates.min_win_rate=0.1", name="a")
    assert parquet(with_gate) == before
    assert len((with_gate / "logs" / "engine_starts.txt").read_text().split()) == 6


def test_the_last_model_is_asked_once_it_is_measured(scripted, tmp_path):
    with pytest.raises(StoppedByGate, match="M2 was expected to pass its gates, but failed 1"):
        scripted(*COMMON, "iterations=1", "gates.max_length_growth=0.1")
    assert store.read_json(tmp_path / "c" / "evaluation" / "M2" / "gates.json")["gates"][0]["passed"] is False
    assert store.read_json(tmp_path / "c" / "evaluation" / "head_to_head" / "results.json")
    # with another iteration M2 makes data, and what it comes to lies there
    scripted(*COMMON, "gates.max_length_growth=50")
    assert gates.read(tmp_path / "c")[2][0].limit == 50
    scripted(*COMMON)
    assert gates.read(tmp_path / "c") == {}


# --- a person -------------------------------------------------------------------------------------------------------


def test_a_campaign_waits_for_a_person_and_asks_nobody_twice(scripted, tmp_path):
    folder, asks = tmp_path / "c", (*COMMON, "gates.approval=true")
    with pytest.raises(WaitsForPerson, match="`srlm approve c`"):
        scripted(*asks)
    assert (folder / "models" / "M2" / "complete.json").exists()
    assert not (folder / "iter_02").exists()
    assert approval.decide(folder, go_on=False) == 1
    before = parquet(folder)
    for _ in range(2):
        with pytest.raises(StoppedByPerson, match="somebody decided so"):
            scripted(*asks)
    assert parquet(folder) == before
    assert approval.decide(folder, go_on=True) == 1
    scripted(*asks)
    assert (folder / "models" / "M3" / "complete.json").exists()
    assert gather(folder)["decided"] == ["After iteration 1 somebody decided: go on."]
    with pytest.raises(StoreError, match="M3 is its last model"):
        approval.decide(folder, go_on=True)


def test_a_decision_holds_for_the_weights_it_was_made_on(scripted, tmp_path):
    folder, asks = tmp_path / "c", (*COMMON, "gates.approval=true")
    with pytest.raises(WaitsForPerson):
        scripted(*asks)
    approval.decide(folder, go_on=True)
    assert approval.read(folder, 1) is True
    marker = folder / "models" / "M2" / "complete.json"
    store.write_json(marker, {**store.read_json(marker), "digest": "trained again"})
    assert approval.read(folder, 1) is None


def test_a_finished_campaign_is_not_asked_about_what_it_did_long_ago(scripted):
    folder = scripted(*COMMON)
    before = parquet(folder)
    scripted(*COMMON, "gates.approval=true")
    assert parquet(folder) == before


def test_there_is_nothing_to_decide_before_the_first_iteration(tmp_path):
    folder = made_up.campaign(tmp_path)
    with pytest.raises(StoreError, match="M2 is its last model"):
        approval.decide(folder, go_on=True)
    (folder / "models" / "M2" / "complete.json").unlink()
    with pytest.raises(StoreError, match="no iteration has finished yet"):
        approval.decide(folder, go_on=True)
