"""The policy gradient, as claims: on a policy and a reward model of two layers."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from engines.tiny import tiny_model
from pydantic import ValidationError

from srlm_core import schemas, training
from srlm_core.config import OnlineConfig, RewardConfig
from srlm_core.engines.training_job import TrainingJob
from srlm_core.errors import TrainingFailed

pytestmark = pytest.mark.engine

KL = 0.05
ENDS = [2, *range(10, 49152, 10)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that ends a turn now and then: every tenth token is one that ends it."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "M0", seed=0)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ENDS}))
    return folder


@pytest.fixture(scope="module")
def reward(child: Any, tiny: Path) -> Path:
    group = {"prompt": "Why?", "responses": [{"text": "So.", "rank": 0}, {"text": "Thus it is.", "rank": 1}]}
    folder = tiny.parent
    pq.write_table(training.rankings([group] * 4), folder / "rankings.parquet")
    child.run(
        TrainingJob(
            kind="reward", rows=folder / "rankings.parquet", init_from=tiny, output=folder / "reward",
            work_dir=made(folder / "reward_work"), threads=2,
            settings=RewardConfig(learning_rate=1e-2, final_learning_rate=1e-3, batch_size=4, precision="float32"),
        ),
        lambda **_: None,
    )  # fmt: skip
    return folder / "reward"


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def job(
    tmp_path: Path, model: Path, reward: Path, *, n: int = 8, name: str = "M2", reference: Path | None = None,
    **changes: Any,
) -> TrainingJob:  # fmt: skip
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"Why {i}?"}]} for i in range(n)]
    pq.write_table(schemas.table(rows, schemas.QUERIES), tmp_path / f"{name}.parquet")
    quick = {
        "precision": "float32",
        "learning_rate": 1e-3, "final_learning_rate": 1e-4, "batch_size": 2, "micro_batch_size": 4, "n": 4, "kl": KL,
        "max_length": 256, "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12},
    }  # fmt: skip
    return TrainingJob(
        kind="online", rows=tmp_path / f"{name}.parquet", init_from=model, reference=reference, reward_model=reward,
        output=tmp_path / name, work_dir=made(tmp_path / f"{name}_work"), threads=2,
        settings=OnlineConfig.model_validate({**quick, **changes}),
    )  # fmt: skip


def weights(path: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def gap(a: Path, b: Path) -> float:
    ours, theirs = weights(a), weights(b)
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_it_samples_rewards_and_trains_and_counts_what_it_sampled(
    child: Any, tiny: Path, reward: Path, tmp_path: Path
) -> None:
    result = child.run(job(tmp_path, tiny, reward), lambda **_: None)
    assert (result.n_rows, result.steps) == (8, 4)
    assert result.log[0]["kl"] == pytest.approx(0, abs=1e-5)  # the policy is its own reference yet
    assert all(row["reward"] is not None for row in result.log)
    assert result.generated_tokens == round(sum(row["completions/mean_length"] for row in result.log) * 8)
    assert 0 < result.generated_tokens <= 4 * 8 * 12
    assert gap(tmp_path / "M2", tiny) > 0


def test_a_step_is_reinforce_with_the_others_mean_reward_taken_off(
    child: Any, tiny: Path, reward: Path, tmp_path: Path
) -> None:
    """By a plain implementation: reward - kl x log-ratio, less the mean of the others; of those that ended."""
    import torch
    from torch.nn.functional import log_softmax
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from srlm_core.engines.rendering import Renderer
    from srlm_core.engines.rewarding import RewardModel

    other = tiny_model(tmp_path / "other", seed=1)
    asked = job(tmp_path, tiny, reward, n=2, reference=other, max_grad_norm=1e9)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows, _, _ = child.load_rows(asked, tokenizer, lambda **_: None)
    trainer = child.make_trainer(asked, rows, [], tokenizer, lambda **_: None)
    sampled: list[Any] = []
    make = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: sampled.append((inputs, make(inputs))) or sampled[-1][1]
    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({name: weight.grad.clone() for name, weight in kwargs["model"].named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    ((inputs, batch),) = sampled
    policy, anchor = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny, other))
    renderer = Renderer(reward)
    judge = RewardModel(reward, renderer, dtype=torch.float32, device="cpu", trust_remote_code=False)

    def logp(model: Any, prompt: list[int], said: list[int]) -> Any:
        each = log_softmax(model(torch.tensor([prompt + said])).logits[0, :-1], dim=-1)
        return each[range(len(prompt) - 1, len(prompt) + len(said) - 1), said].sum()

    logps, rewards, ended = [], [], []
    for i, row in enumerate(inputs):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        said = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        logps.append(logp(policy, prompt, said))
        ended.append(said[-1] in ENDS)
        text = tokenizer.decode(said, skip_special_tokens=True)
        with torch.no_grad():
            log_ratio = logps[-1].item() - logp(anchor, prompt, said).item()
        rewards.append(judge.rewards([renderer.whole(row["prompt"], text)])[0] - KL * log_ratio)
    assert any(ended)
    assert not all(ended)
    advantages = []
    for i in range(8):
        others = [rewards[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i and ended[j]]
        advantages.append(rewards[i] - sum(others) / len(others) if ended[i] and others else 0.0)
    assert batch["advantages"].tolist() == pytest.approx(advantages, abs=1e-3)
    loss = -sum(a * logp for a, logp in zip(advantages, logps, strict=True)) / 8
    loss.backward()
    for name, weight in policy.named_parameters():
        assert (found[name] - weight.grad).abs().max().item() < 1e-3 * max(1, weight.grad.abs().max().item())


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(child: Any, tiny: Path, reward: Path, tmp_path: Path) -> None:
    child.run(job(tmp_path, tiny, reward, name="whole", checkpoint_steps=2), lambda **_: None)
    cut, save = job(tmp_path, tiny, reward, name="cut", checkpoint_steps=2), child.save
    child.save = _dies
    try:
        with pytest.raises(KeyboardInterrupt):
            child.run(cut, lambda **_: None)
    finally:
        child.save = save
    result = child.run(cut, lambda **_: None)
    assert result.resumed_from_step == 2
    assert len(result.log) == 4
    assert gap(tmp_path / "whole", tmp_path / "cut") < 1e-6


def _dies(*_: Any) -> None:
    raise KeyboardInterrupt


def test_prompts_that_leave_no_room_are_left_out_and_too_few_for_a_step_are_refused(
    child: Any, tiny: Path, reward: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingFailed, match=r"one step at least, batch_size=16, got 8\. Lower training\.online"):
        child.run(job(tmp_path, tiny, reward, batch_size=16), lambda **_: None)
    with pytest.raises(TrainingFailed, match=r"rows of at most max_length=40 tokens .* the shortest has \d+"):
        child.run(job(tmp_path, tiny, reward, name="long", max_length=40), lambda **_: None)


def test_settings_that_cannot_work_together_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"batch_size x n to be a multiple of micro_batch_size, got 3 x 2 and 4"):
        OnlineConfig(batch_size=3, n=2, micro_batch_size=4)
    with pytest.raises(ValidationError, match=r"prompts have no answer to check by"):
        OnlineConfig(heldout_share=0.1)
    with pytest.raises(ValidationError, match=r"kind 'online' needs a reward_model"):
        TrainingJob(
            kind="online", rows=Path("a"), init_from=Path("b"), output=Path("c"), work_dir=Path("d"),
            settings=OnlineConfig(),
        )  # fmt: skip
