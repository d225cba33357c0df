"""Training a reward model: TRL's RewardTrainer, a row of which is a prompt with all its ranked responses.

Each response goes through the model once, in however many pairs it is.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from trl.trainer.reward_config import RewardConfig as TrlRewardConfig
from trl.trainer.reward_trainer import RewardTrainer, suppress_seqcls_warning

from srlm_core.config import RewardConfig
from srlm_core.engines import losses
from srlm_core.engines.packed import pack
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.rewarding import padding
from srlm_core.engines.trainers import ByRow
from srlm_core.errors import TrainingFailed


def texts_of(row: dict[str, Any], renderer: Renderer) -> tuple[list[int], ...]:
    """Render a row's responses, each with the prompt, as they will be scored; raises TrainingFailed if none is better.

    Two that were ranked alike give no pair.
    """
    ranks = row["ranks"]
    if len(set(ranks)) < 2 or len(ranks) != len(row["responses"]):
        raise TrainingFailed(
            f"training (reward): expected ranks that prefer some response to another, one rank a response, got {ranks} "
            f"for {len(row['responses'])} responses (row {row['id']}). Leave the row out."
        )
    return tuple(renderer.whole(row["prompt"], response) for response in row["responses"])


def load(path: Path, renderer: Renderer, *, seed: int, trust_remote_code: bool, packed: bool) -> Any:
    """Load a language model in float32 with a new head of one number in the place of its vocabulary's.

    The head begins as Tulu 3's does, with standard deviation 1 / sqrt(width + 1): rewards begin near 0, and differ.
    `packed`: batches are computed as trees (engines/packed.py).
    """
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.config.get_text_config().pad_token_id = padding(renderer.tokenizer, renderer.ends)
    head = model.get_submodule("score")
    torch.manual_seed(seed)
    torch.nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if packed:
        pack(model)
    return model


class _OfRanks(RewardTrainer):
    """RewardTrainer with the loss of a whole ranking in the place of a pair's."""

    settings: RewardConfig

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the rows; keep accuracy, lead and mean reward."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**given, use_cache=False)
        rewards = outputs.logits[:, 0].float().split(inputs["sizes"])
        ranked = list(zip(rewards, inputs["ranks"].split(inputs["sizes"]), strict=True))
        loss = torch.stack([self._of_row(*row) for row in ranked]).mean()
        seen = torch.stack([_seen(*row) for row in ranked])
        told: Any = self.accelerator.gather(seen.mean(dim=0)[None])
        for name, value in zip(("accuracy", "margin", "mean_reward"), told.mean(dim=0).tolist(), strict=True):
            self._metrics["train" if model.training else "eval"][name].append(value)
        return (loss, outputs) if return_outputs else loss

    def _of_row(self, rewards: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        if len(rewards) == 1:  # a blank row
            return 0 * rewards.sum()
        return losses.ranking(rewards, ranks, margin=self.settings.margin, centre=self.settings.centre)


def _seen(rewards: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return the share of a row's pairs that are in their order, the mean lead of the better one, and mean reward."""
    rewards = rewards.detach()
    if len(rewards) == 1:
        return rewards.new_zeros(3)
    better, worse = torch.nonzero(ranks[:, None] < ranks[None, :], as_tuple=True)
    lead = rewards[better] - rewards[worse]
    return torch.stack([(lead > 0).float().mean(), lead.mean(), rewards.mean()])


class Reward(ByRow, _OfRanks):
    """RewardTrainer on rows that are tokenized already: texts and their ranks."""

    def __init__(self, *, settings: RewardConfig, words: dict[str, Any], model: Any, **kwargs: Any) -> None:
        self.settings = settings
        pad = model.config.get_text_config().pad_token_id
        kwargs["processing_class"].pad_token_id = pad  # the Trainer takes the tokenizer's, which may end a turn
        super().__init__(model=model, args=TrlRewardConfig(**words), data_collator=partial(_collate, pad), **kwargs)

    def n_rows(self, batch: Any) -> int:
        return len(batch["sizes"])

    def n_told(self, batch: Any) -> int:
        return sum(size > 1 for size in batch["sizes"])  # a blank row is one text, a ranking more


def _collate(pad: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lay the texts of all rows one below the other, [texts, longest], and say how many each row has."""
    texts = [torch.tensor(text) for row in rows for text in row["texts"]]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True),
        "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
        "sizes": [len(row["texts"]) for row in rows],
    }
