"""The reward model's child: a text in, a number out, read where the text ends.

Forward passes over whole texts are all it does, so plain PyTorch is near what the hardware gives. Only this child, and
the trainer that is rewarded, import the module: they pay for torch and transformers at the top.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # transformers imports what it finds and this never calls: seconds of start-up
    sys.modules.update(dict.fromkeys(("sklearn", "scipy", "vllm", "triton"), None))  # type: ignore[arg-type]

import torch
from transformers import AutoModelForSequenceClassification

from srlm_core.config import EngineConfig
from srlm_core.engines.exact_head import exact
from srlm_core.engines.messages import Answer, Appraised, Start
from srlm_core.engines.protocol import Reward
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.serving import Appraisal, Task, serve
from srlm_core.errors import ModelError

PASS_TOKENS = 4096
"""Tokens of one forward pass, padding included; one longer text goes alone."""


class RewardModel:
    """A causal model with a head of one number, which transformers reads at the last token that is not padding."""

    def __init__(self, path: Path, renderer: Renderer, *, dtype: torch.dtype, device: str, trust_remote_code: bool):
        """Load it. Raises ModelError where its head is not in the checkpoint, or its tokenizer is another model's."""
        self.model: Any
        self.model, told = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ModelError(
                f"{path}: expected the weights of a reward model, {', '.join(sorted(told['missing_keys'])[:3])} is "
                "missing: its rewards would be random. Copy it again, or name a model that was trained to give rewards."
            )
        config = self.model.config.get_text_config()
        require_fit(path, renderer.tokenizer, config)
        if config.pad_token_id is None:
            config.pad_token_id = padding(renderer.tokenizer, renderer.ends)
        self.device, self.pad, head = device, config.pad_token_id, getattr(self.model, "score", None)
        self.head = head if isinstance(head, torch.nn.Linear) else None
        """None: a head of somebody's own making, which is taken as it is."""
        self.model.to(device).eval()

    def rewards(self, texts: Sequence[list[int]]) -> list[float]:
        """Return the reward of each text, given as token ids, in one forward pass."""
        rows = [torch.tensor(text) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad).to(self.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.no_grad(), exact(self.head) if self.head else nullcontext():
            said = self.model(input_ids=ids, attention_mask=mask.to(self.device), use_cache=False).logits
        return said[:, 0].float().tolist()


def require_fit(path: Path, tokenizer: Any, config: Any) -> None:
    """Raise ModelError where a model cannot have been trained with this tokenizer."""
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{path}: expected the reward model's own tokenizer, got one of {len(tokenizer)} tokens where the model "
            f"knows {config.vocab_size}. Put the tokenizer that it was trained with beside its weights."
        )
    ends = config.eos_token_id
    for end in [ends] if isinstance(ends, int) else ends or []:
        if end not in tokenizer.all_special_ids:
            raise ModelError(
                f"{path}: expected the reward model's own tokenizer, got one in which the token that ends its texts, "
                f"{end}, is {tokenizer.convert_ids_to_tokens(end)!r}, an ordinary one. "
                "Put the tokenizer that it was trained with beside its weights."
            )


def padding(tokenizer: Any, ends: frozenset[int]) -> int:
    """Choose the token that pads: a special one that ends no turn, or a reward would be read before the end.

    Raises ModelError where there is none.
    """
    first = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    for token in first:
        if token is not None and token not in ends:
            return token
    raise ModelError(
        f"{tokenizer.name_or_path}: expected a special token that ends no turn, to pad with, got "
        f"{tokenizer.all_special_tokens}. Add one to the tokenizer, such as <|pad|>."
    )


class Rewarder:
    """Runs a reward model; the waiting texts go in passes of like length."""

    def __init__(self, start: Start, config: EngineConfig, renderer: Renderer, context: int) -> None:
        torch.set_num_threads(start.threads)
        self.model = RewardModel(
            Path(start.model), renderer, dtype=getattr(torch, config.dtype), device="cuda" if start.gpu else "cpu",
            trust_remote_code=start.trust_remote_code,
        )  # fmt: skip
        self.waiting: list[Appraisal] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def add(self, task: Task) -> None:
        assert isinstance(task, Appraisal), "the parent asks a reward model for nothing else"
        self.waiting.append(task)

    def forget(self, keys: frozenset[int]) -> None:
        self.waiting = [task for task in self.waiting if task.key not in keys]

    def step(self) -> list[Answer]:
        self.waiting.sort(key=lambda task: len(task.prompt))
        longest = len(self.waiting[-1].prompt)
        taken = self.waiting[-max(1, PASS_TOKENS // longest) :]
        del self.waiting[-len(taken) :]
        rewards = self.model.rewards([task.prompt for task in taken])
        return [
            Appraised(task.key, Reward(task.id, reward, len(task.prompt)))
            for task, reward in zip(taken, rewards, strict=True)
        ]


if __name__ == "__main__":
    serve(Rewarder)
