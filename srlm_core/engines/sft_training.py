"""Supervised fine-tuning by TRL's SFTTrainer, on rows that are tokenized already."""

from typing import Any

from trl.trainer.sft_trainer import SFTTrainer

from srlm_core.engines.trainers import BLANK, Ours


class Sft(Ours, SFTTrainer):
    """SFTTrainer on rows that are tokenized already."""

    def n_rows(self, batch: Any) -> int:
        return len(batch["labels"])

    def n_told(self, batch: Any) -> int:
        return int((batch["labels"] != -100).any(dim=1).sum())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss: the mean over the step's tokens of all ranks, and of held-out rows over each batch's."""
        if self.accelerator.num_processes == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        n_rows, n_told, (rows, told) = self.n_rows(inputs), self.n_told(inputs), self.of_all_ranks(inputs)
        checks = not self.model.training
        loss = super().compute_loss(model, inputs, return_outputs, None if checks else num_items_in_batch)
        self.leave_out_tokens((rows - told) * BLANK)
        if not told:  # nothing but blank rows: nothing to take the mean of
            for name in ("entropy", "mean_token_accuracy"):
                self._metrics[self.mode][name].pop()
        return loss * n_told / n_rows / self.checked_share if checks else loss
