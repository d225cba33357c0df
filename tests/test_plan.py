"""The plan's arithmetic, worked by hand."""

import pytest

from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError
from srlm_core.plan import Hardware, generated_tokens, plan, target_for

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
ROWS = {"ift": 10, "eft": 20, "evaluation": 7, "heldout": 8}


def planned(config=CONFIG):
    hardware = Hardware("one device", flops=2e9, training_flops=4e9, devices=1)  # 1,000 tokens/s for a million weights
    return {line.what: line.value for line in plan(config, 1_000_000, 4_000_000, hardware, ROWS, [60])}


def test_requests_and_tokens_by_hand():
    lines = planned()
    assert lines["new prompts"] == 60
    assert lines["requests for prompts"] == 100  # 60 / 0.6
    assert lines["responses"] == 240
    assert lines["judgments"] == 720
    assert lines["tokens generated"] == pytest.approx(100 * 50 + 240 * (100 + 3 * 50))
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
    assert {lines[f"{pool}responses"] for pool in ("", "early ", "future ")} == {240}
    assert {lines[f"{pool}judgments"] for pool in ("", "early ", "future ")} == {720}
    assert lines["tokens generated"] == pytest.approx(100 * 50 + 3 * 240 * (100 + 3 * 50))
    assert lines["tokens trained on"] - plain["tokens trained on"] == pytest.approx(60 * 0.6 * 2 * 160)
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


def config(method, **changes):
    """Change CONFIG: a prompt takes 50 tokens to ask for, 100 to answer, 50 to judge."""
    return RunConfig.model_validate({**CONFIG.model_dump(), "method": method, **changes})


@pytest.mark.parametrize(
    ("asked", "prompts", "tokens"),
    [
        # 100 prompts are asked for; 4 answers, 12 judgments; 3 x 2 meetings of the judgments of one answer, 256 each
        (config("meta_rewarding"), [60], 5_000 + 60 * (400 + 600 + 6 * 256)),
        (config("meta_rewarding", iterations=2, schedule=[{"iteration": 2, "set": {"meta.trains_judge": False}}]),
         [60, 60], 2 * (5_000 + 60 * 1_000) + 60 * 6 * 256),
        (config("meta_rewarding", meta={"reading": "expected"}), [60], 5_000 + 60 * 1_000),
        # an answer, 4 critiques and 4 revisions of it, then 4 answers; preferences are read off
        (config("rlaif"), [60], 5_000 + 60 * (100 + 800 + 400)),
        # … or explained: 6 pairs in both orders, 128 each
        (config("rlaif", rlaif={"justified": True}), [60], 5_000 + 60 * (1_300 + 12 * 128)),
        # nobody writes prompts; the reference is judged, too
        (config("dno"), [60], 60 * (400 + 5 * 3 * 50)),
        (config("dno", dno={"judge_by": "win_rate"}), [60], 60 * 400),
        # people wrote all of the first iteration
        (config("dice", iterations=2), [20, 60], 5_000 + 60 * 400),
        (config("cream"), [60], 5_000 + 60 * 400),
        (config("sppo"), [60], 5_000 + 60 * 400),
        (config("dpo"), [60], 0),
        (config("rlhf"), [60], 5_000 + 60 * 400),
        # it answers while it trains: 4 responses of 256
        (config("rlhf_online"), [60], 5_000 + 60 * 4 * 256),
    ],
)  # fmt: skip
def test_all_that_a_method_generates_is_counted(asked, prompts, tokens):
    assert generated_tokens(asked, 20, prompts) == pytest.approx(tokens)


def test_a_judged_pair_of_each_prompt_or_several_are_trained_on():
    """6 in 10 prompts; of 4 answers and a reference 10 pairs at most, 320 tokens each."""
    sft = 2 * 10 * 120 + 20 * 300
    assert planned(config("dno"))["tokens trained on"] == pytest.approx(sft + 60 * 0.6 * 10 * 320)
    two = config("dno", dno={"max_pairs_per_prompt": 2})
    assert planned(two)["tokens trained on"] == pytest.approx(sft + 60 * 0.6 * 2 * 320)


def test_a_budget_becomes_prompts_and_too_small_a_one_names_the_smallest():
    assert target_for(CONFIG, 20, 65_000) == 60
    assert target_for(config("dpo"), 20, 65_000) is None
    assert target_for(CONFIG, 20, 1_084) == 1
    with pytest.raises(ConfigError, match="at least 1,084 for self_rewarding"):
        target_for(CONFIG, 20, 1_083)
    taught = config("self_rewarding", seed_data={"eft_targets": "self"})
    # 20 ranked responses, 3 passes, 256 tokens each, before the first prompt
    assert target_for(taught, 20, 20 * 3 * 256 + 65_000) == 60


def test_hours_and_disk_by_hand():
    lines = planned()
    assert lines["hours of sampling"] == pytest.approx((65_000 + 61_200) / 1000 / 3600)
    assert lines["hours of training"] == pytest.approx((8_400 * 6 + 11_520 * 8) * 1e6 / 4e9 / 3600)
    assert lines["disk"] == pytest.approx((3 * 4e6 + 2 * 12e6) / 1024**3)  # baseline, M1, M2; two checkpoints


def test_evaluation_counts_every_model():
    evaluated = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"models": "all"})})
    # M0, baseline, M1, M2: answers to 7 prompts, 8 held-out responses judged with a justification
    assert planned(evaluated)["tokens of evaluation"] == 4 * (7 * 100 + 8 * (80 + 50))
