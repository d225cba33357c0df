"""RLHF with a Bradley-Terry reward model (InstructGPT, arXiv:2203.02155), online: by a policy gradient.

A reward model learns what people ranked, once. Then the policy answers while it trains, and each response's gradient is
weighed by its reward, less those of the others to its prompt (RLOO, arXiv:2402.14740), in the place of PPO.
"""

from srlm_core.config import RunConfig
from srlm_core.methods import steps
from srlm_core.methods.record import Asked, Method


def samples(config: RunConfig, t: int) -> Asked:
    """Count the responses to a prompt, in each epoch anew; the reward model and the reference read them."""
    how = config.training.online
    return Asked(how.n * how.epochs, how.sampling.max_tokens, 2 * how.n * how.epochs)


METHOD = Method(
    name="rlhf_online",
    title="Reinforcement learning from human feedback, by RLOO",
    source="arXiv:2203.02155",
    given=steps.own_prompts,
    teaches_judging=False,
    learns="online",
    training_asks=samples,
    steps=(steps.REWARD_MODEL, steps.PROMPTS),
)
