"""The plan's arithmetic, worked by hand."""

import pytest

from srlm_core.config import RunConfig
from srlm_core.plan import Hardware, plan

CONFIG = RunConfig.model_validate(
    {
        "method": "self_rewarding",
        "iterations": 1,
        "prompts": {"target": 60, "sampling": {"max_tokens": 100}},
        "responses": {"n": 4, "sampling": {"max_tokens": 200}},
        "judgments": {"k": 3, "sampling": {"max_tokens": 100}},
        "evaluation": {"models": "none"},
    }
)
ROWS = {"ift": 10, "eft": 20, "evaluation": 7, "heldout": 8, "prompts": 60}


def planned(config=CONFIG):
    hardware = Hardware("one device", flops=2e9, training_flops=4e9, devices=1)  # 1,000 tokens/s for a million weights
    return {line.what: line.value for line in plan(config, 1_000_000, 4_000_000, hardware, ROWS)}


def test_requests_and_tokens_by_hand():
    lines = planned()
    assert lines["new prompts"] == 60
    assert lines["requests for prompts"] == 100  # 60 / 0.6
    assert lines["responses"] == 240
    assert lines["judgments"] == 720
    assert lines["tokens generated"] == 100 * 50 + 240 * (100 + 3 * 50)
    assert lines["tokens read"] == 100 * 300 + 60 * (2 * 60 + 4 * 100)
    assert lines["tokens of evaluation"] == 0
    assert lines["tokens trained on"] == (2 * 10 * 120 + 20 * 300) + 60 * 0.6 * 2 * 160


def test_a_loss_that_asks_the_model_reads_the_questions_too():
    """A pair's two responses, and two questions of rubric, prompt and both: 2 x 160 + 2 x (180 + 60 + 2 x 100)."""
    dpo = CONFIG.training.dpo.model_copy(update={"loss": "scir"})
    config = CONFIG.model_copy(update={"method": "scir", "training": CONFIG.training.model_copy(update={"dpo": dpo})})
    assert planned(config)["tokens trained on"] == (2 * 10 * 120 + 20 * 300) + 60 * (320 + 880)


def test_two_more_models_that_answer_and_one_more_that_learns():
    """M_t, M0 and M_f each answer N times; a frozen 4 MB model more is kept, and DPO runs twice."""
    on = CONFIG.temporal.model_copy(update={"rejected_from": "base", "chosen_from_future": True})
    lines, plain = planned(CONFIG.model_copy(update={"temporal": on})), planned()
    assert (lines["responses"], lines["judgments"]) == (3 * 240, 3 * 720)
    assert lines["tokens generated"] == 100 * 50 + 3 * 240 * (100 + 3 * 50)
    assert lines["tokens trained on"] - plain["tokens trained on"] == 60 * 0.6 * 2 * 160
    assert lines["disk"] - plain["disk"] == pytest.approx(4e6 / 1024**3)


def test_a_method_without_a_judge_asks_for_less():
    lines = planned(
        CONFIG.model_copy(update={"method": "spin", "responses": CONFIG.responses.model_copy(update={"n": 1})})
    )
    assert (lines["requests for prompts"], lines["responses"], lines["judgments"]) == (0, 60, 0)
    assert lines["tokens generated"] == 60 * 100
    assert lines["tokens trained on"] == 10 * 120 + 60 * 2 * 160
    offline = planned(CONFIG.model_copy(update={"method": "dpo"}))
    assert (offline["responses"], offline["tokens generated"]) == (0, 0)


def test_hours_and_disk_by_hand():
    lines = planned()
    assert lines["hours of sampling"] == pytest.approx((65_000 + 61_200) / 1000 / 3600)
    assert lines["hours of training"] == pytest.approx((8_400 * 6 + 11_520 * 8) * 1e6 / 4e9 / 3600)
    assert lines["disk"] == pytest.approx((3 * 4e6 + 2 * 12e6) / 1024**3)  # baseline, M1, M2; two checkpoints


def test_evaluation_counts_every_model():
    evaluated = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"models": "all"})})
    # M0, baseline, M1, M2: answers to 7 prompts, 8 held-out responses judged with a justification
    assert planned(evaluated)["tokens of evaluation"] == 4 * (7 * 100 + 8 * (80 + 50))
