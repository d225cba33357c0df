import math
import tracemalloc
from collections import Counter

import made_up
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from srlm_core import counting, schemas, store, summary, table
from srlm_core.spelling import spell


def test_an_iteration_worked_by_hand(tmp_path):
    found = summary.iteration_metrics(made_up.campaign(tmp_path), 1)
    expected = {
        "prompts/kept": 3,
        # 3 kept, 2 refused; the 5 over the target passed every filter and are in neither
        "prompts/yield": 3 / 5,
        "prompts/dropped_too_short": 2,
        "prompts/dropped_over_target": 5,
        "responses/n": 6,
        "responses/length_tokens_mean": (10 + 20 + 30 + 40 + 10 + 10) / 6,
        "responses/length_chars_mean": 2 * (10 + 20 + 30 + 40 + 10 + 10) / 6,
        "responses/truncated_rate": 1 / 6,
        # 18 judgments of k = 3, three of them unreadable; sqrt(5/6 * 1/6 / 18) = 0.0878
        "judgments/readable_rate": 15 / 18,
        "judgments/readable_rate_stderr": math.sqrt(5 / 6 * 1 / 6 / 18),
        "judgments/readable_rate_n": 18,
        # r3 has one readable verdict of three, which is too few for a score: (4.33 + 1 + 2 + 3 + 3) / 5
        "judgments/score_mean": (13 / 3 + 1 + 2 + 3 + 3) / 5,
        "judgments/score_mean_n": 5,
        # 4, 4, 5 spread by sqrt(2)/3 = 0.471; the other four responses do not spread
        "judgments/spread_over_passes": math.sqrt(2) / 3 / 5,
        "judgments/tie_rate": 1 / 3,
        "pairs/n": 1,
        "pairs/yield": 1 / 3,
        "pairs/margin_mean": 13 / 3 - 1,
        "pairs/chosen_length_tokens_mean": 10,
        "pairs/rejected_length_tokens_mean": 20,
        # ranks of scores 5 1 2 3.5 3.5 and of lengths 2 4 5 2 2: covariance -7, variances 9.5 and 8
        "judgments/score_length_correlation": -7 / math.sqrt(9.5 * 8),
        "training/loss_first": 1.0,
        "training/loss": (0.82 + 0.81) / 2,
        "training/rewards_accuracy": 0.8,
        "training/rewards_margin": 0.2,
        "training/n_rows": 1,
        "training/dropped": 0,
        "training/seconds": 7.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    shares = [share / 15 for share in (2, 1, 2, 7, 3)]
    assert found["judgments/score_entropy"] == pytest.approx(-sum(share * math.log2(share) for share in shares))


def test_a_pass_that_k_does_not_ask_for_is_in_no_number(tmp_path):
    folder = made_up.campaign(tmp_path, judgments={"k": 4, "min_valid": 2})
    assert summary.iteration_metrics(folder, 1)["judgments/readable_rate_n"] == 19


def test_models_are_measured_under_flat_names(tmp_path):
    found = summary.model_metrics(made_up.campaign(tmp_path), "M2")
    expected = {
        "evaluation/judge_pairwise_accuracy": 0.6,
        "evaluation/judge_pairwise_accuracy_stderr": 0.04,
        "evaluation/judge_pairwise_accuracy_n": 240,
        "evaluation/longer_accuracy": 0.52,
        "evaluation/text_readable_rate": 0.8,
        "evaluation/attack_shift": 0.5,
        "evaluation/response_length_tokens_mean": 100,
        # 60 wins, 20 ties, 20 losses of 100
        "evaluation/win_rate_vs_M1": 0.7,
        "evaluation/win_rate_vs_M1_stderr": 0.04,
        "evaluation/win_rate_vs_M1_n": 100,
        "evaluation/win_rate_vs_sft_baseline": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "evaluation/judge_five_best" not in found
    assert not [name for name in summary.model_metrics(tmp_path / "made-up", "M1") if "_vs_" in name]


def test_every_metric_is_a_number_named_stage_slash_measure(tmp_path):
    folder = made_up.campaign(tmp_path)
    found = summary.iteration_metrics(folder, 1) | summary.model_metrics(folder, "M2")
    stages = {"prompts", "responses", "judgments", "pairs", "training", "evaluation"}
    assert {name.split("/")[0] for name in found} == stages
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_models_come_in_the_order_of_the_method(tmp_path):
    for name in ("M10", "M2", "elsewhere", "sft_baseline", "M1"):
        store.write_json(tmp_path / "evaluation" / name / "results.json", {})
    assert summary.models(tmp_path) == ["M0", "sft_baseline", "M1", "M2", "M10", "elsewhere"]


def test_results_of_weights_that_were_replaced_are_not_shown(tmp_path):
    folder = made_up.campaign(tmp_path)
    made_up.results(folder, "M2", half=0.9, digest="of another training")
    assert summary.model_metrics(folder, "M2") == {}
    assert summary.head_to_heads(folder)[1] == {}
    assert "M2 is not evaluated yet" in summary.collect(folder).missing


def test_the_table_has_a_row_per_model_and_none_for_what_is_not_known(tmp_path):
    folder = made_up.campaign(tmp_path)
    rows = {row["model"]: row for row in table.of_campaign(folder)}
    assert list(rows) == ["M0", "sft_baseline", "M1", "M2"]
    accuracy = [rows["M1"][f"judge_accuracy{end}"] for end in ("", "_stderr", "_n")]
    assert accuracy == pytest.approx([0.45, 0.04, 240])
    assert (rows["M1"]["pairs"], rows["M2"]["pairs"]) == (1, None)
    assert (rows["M2"]["before"], rows["M2"]["win_rate_vs_before"]) == ("M1", pytest.approx(0.7))
    assert rows["M1"]["win_rate_vs_before"] is None


def test_the_table_as_text_is_aligned_and_carries_its_errors(tmp_path):
    text = table.as_text(table.of_campaign(made_up.campaign(tmp_path)))
    head, _, *lines = text.split("\n")
    accuracy = next(line for line in lines if line.startswith("judge accuracy"))
    assert accuracy.split() == ["judge", "accuracy", "0.40±0.04", "0.40±0.04", "0.45±0.04", "0.60±0.04"]
    assert len(accuracy) == len(head) <= 80
    assert "240 held-out pairs" in text


def test_campaigns_side_by_side_say_which_is_which(tmp_path):
    rows = [
        {"campaign": name, **row}
        for name in ("a", "b")
        for row in table.of_campaign(made_up.campaign(tmp_path, name=name))
    ]
    assert "a/M2" in table.as_text(rows)
    assert "b/sft_baseline" in table.as_text(rows)


def test_numbers_are_spelled_with_error_and_n():
    assert spell(0.614, 0.041, 240) == "0.61 ± 0.04 (n = 240)"
    assert spell(-0.5, 0.2, form="+.2f") == "−0.50 ± 0.20"
    assert spell(-0.001, 0.2, form="+.2f") == "0.00 ± 0.20"
    assert spell(None, None, 0) == "–"


def test_an_empty_folder_is_a_campaign_of_which_nothing_is_known(tmp_path):
    assert summary.iteration_metrics(tmp_path, 1)["pairs/n"] == 0
    assert "pairs/yield" not in summary.iteration_metrics(tmp_path, 1)
    assert summary.model_metrics(tmp_path, "M1") == {}
    assert [row["model"] for row in table.of_campaign(tmp_path)] == ["M0"]
    assert table.as_text(table.of_campaign(tmp_path))


def test_a_damaged_part_is_named_and_not_counted(tmp_path):
    folder = made_up.campaign(tmp_path)
    part = folder / "iter_01" / "judgments" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    assert summary.iteration_metrics(folder, 1)["judgments/readable_rate_n"] == 12
    assert [line for line in summary.collect(folder).missing if "iter_01/judgments/part-00001.parquet" in line]


def test_an_iteration_that_grew_is_counted_again(tmp_path):
    folder = made_up.campaign(tmp_path)
    assert counting.read_iteration(folder, 1, None) is counting.read_iteration(folder, 1, None)
    store.part_path(folder / "iter_01" / "prompts", 1).unlink()
    assert summary.iteration_metrics(folder, 1)["prompts/kept"] == 2


def test_a_finished_campaign_misses_nothing(scripted):
    folder = scripted()
    config = made_up.config(iterations=2, engine={"kind": "scripted"})
    store.write_json(folder / "config.json", config.model_dump(mode="json"))
    assert summary.collect(folder).missing == []


def test_what_is_counted_agrees_with_the_rows(scripted):
    folder = scripted()
    found = summary.iteration_metrics(folder, 2)
    for dataset, name in (("prompts", "prompts/kept"), ("responses", "responses/n"), ("pairs", "pairs/n")):
        assert found[name] == sum(1 for _ in store.iter_rows(folder / "iter_02" / dataset))


def test_memory_does_not_grow_with_the_number_of_parts(tmp_path):
    responses = [made_up.response("r1", {}) | {"response_id": f"r{i}", "n_tokens": i % 50} for i in range(2000)]
    store.write_part(tmp_path / "part", schemas.table(responses, schemas.RESPONSES), "f")

    def peak(parts):
        for shard in range(parts):
            path = store.part_path(tmp_path / "iter_01" / "responses", shard)
            store.write_atomically(path, lambda aside: aside.write_bytes((tmp_path / "part").read_bytes()))
        counting._counted.cache_clear()
        tracemalloc.start()
        assert counting.read_iteration(tmp_path, 1, None).tokens.n == 2000 * parts
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    few = peak(2)
    assert peak(16) < 1.5 * few


@given(st.lists(st.tuples(st.integers(0, 10).map(lambda n: n / 2), st.integers(1, 6)), min_size=2, max_size=40))
def test_the_rank_correlation_of_counted_cells_is_that_of_the_rows(points):
    found = counting.spearman(Counter(points))
    if len({x for x, _ in points}) < 2 or len({y for _, y in points}) < 2:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr([x for x, _ in points], [y for _, y in points]).statistic, abs=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_mean_seen_once_is_the_mean(values):
    mean = counting.Mean()
    for value in values:
        mean.add(value)
    centre = math.fsum(values) / len(values)
    spread = math.fsum((value - centre) ** 2 for value in values)
    assert mean.value == pytest.approx(centre, abs=1e-6)
    assert mean.stderr == pytest.approx(math.sqrt(spread) / len(values), rel=1e-6, abs=1e-6)
