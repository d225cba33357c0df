"""A policy gradient on a reward model's word: TRL's RLOOTrainer (arXiv:2402.14740), which samples as it trains.

The reward of a response, less the mean reward of the others to its prompt, scales the gradient of its log-probability.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from srlm_core.config import OnlineConfig
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.rewarding import PASS_TOKENS, RewardModel
from srlm_core.engines.trainers import Quiet

REWARD = "reward"


def rewarder(path: Path, ends: frozenset[int], *, trust_remote_code: bool) -> Callable[..., list[float | None]]:
    """Load a reward model, and return what TRL asks: the reward of each completion, None where it did not end.

    What was cut has no end to be read at: it weighs nothing, and is not in its prompt's mean.
    """
    renderer = Renderer(path, trust_remote_code=trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = RewardModel(path, renderer, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **others: Any
    ) -> list[float | None]:
        ended = [i for i, ids in enumerate(completion_ids) if ids[-1] in ends]
        texts = {i: renderer.whole(prompts[i], completions[i][0]["content"]) for i in ended}
        rewards: list[float | None] = [None] * len(completion_ids)
        waiting = sorted(ended, key=lambda i: -len(texts[i]))
        while waiting:
            taken = waiting[: max(1, PASS_TOKENS // len(texts[waiting[0]]))]
            waiting = waiting[len(taken) :]
            for i, value in zip(taken, model.rewards([texts[i] for i in taken]), strict=True):
                rewards[i] = value
        return rewards

    return reward


class Online(Quiet, RLOOTrainer):
    """RLOOTrainer whose draws depend on the seed and the step alone, so that a killed run goes on as it would have."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        where = f"{self.args.seed} {self.state.global_step} {self.accelerator.process_index}"
        torch.manual_seed(int(hashlib.sha256(where.encode()).hexdigest()[:15], 16))
        return super()._generate_and_score_completions(inputs)


def arguments(settings: OnlineConfig, words: Mapping[str, Any]) -> RLOOConfig:
    """The settings, in TRL's words."""
    theirs = {name: value for name, value in words.items() if name != "max_length"}
    drawn = settings.sampling
    return RLOOConfig(
        **theirs, beta=settings.kl, epsilon=settings.clip, num_generations=settings.n, disable_dropout=True,
        temperature=drawn.temperature, top_p=drawn.top_p, max_completion_length=drawn.max_tokens,
        use_vllm=settings.vllm, vllm_mode="colocate",
    )  # fmt: skip


def generated_tokens(log: Sequence[Mapping[str, Any]], settings: OnlineConfig) -> int:
    """Count the tokens that were sampled, from the steps' own words; a step that was taken twice counts once."""
    lengths = [row["completions/mean_length"] for row in log if row.get("completions/mean_length") is not None]
    return round(sum(lengths) * settings.batch_size * settings.n)
