"""Training on pairs by TRL's DPOTrainer, and the losses that it does not have in the place of its own."""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import trl.trainer.dpo_trainer
from trl.trainer.dpo_trainer import DPOTrainer

from srlm_core.config import DpoConfig
from srlm_core.engines import losses, ranks
from srlm_core.engines.callbacks import Report
from srlm_core.engines.exact_head import exact
from srlm_core.engines.trainers import ByRow
from srlm_core.engines.training_rows import QUESTIONS, Tokenized

# Names a cache that we do not use, at the price of reading every weight
trl.trainer.dpo_trainer.hash_module = lambda module: ""  # pyright: ignore[reportPrivateImportUsage]

_ASKED = ("question_ids", "question_mask", "question_choices")
"""The same in a batch: [2B, Q] token ids, padded on the right, all of `asked_ab` first; [2B, Q]; [2B, 2] token ids."""
_OF_LABELS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip
"""TRL's metrics that say nothing where nobody knows which response is the better one."""


class Dpo(ByRow, DPOTrainer):
    """DPOTrainer on rows that are tokenized already.

    Where each pair is certain and weighs 1 and nothing but DPO's own loss is asked for, that is TRL's, untouched.
    """

    def __init__(
        self, *args: Any, settings: DpoConfig, plain: bool, folder: Path, report: Report, **kwargs: Any
    ) -> None:
        self.settings, self.plain, self.folder, self.report = settings, plain, folder, report
        super().__init__(*args, **kwargs)
        self.ref_model = None  # its log-probabilities are on file: the memory of one model is enough
        self.beside = losses.reads(settings)
        if not plain:
            self.loss_weights = [0.0]  # of TRL's loss the auxiliary one of experts stays, where a model has them
            self.data_collator = _with_numbers(self.data_collator, self.beside)

    texts_per_row = 2

    def n_rows(self, batch: Any) -> int:
        return batch["input_ids"].shape[0] // 2

    def n_told(self, batch: Any) -> int:
        return int(batch["completion_mask"].any(dim=1).sum()) // 2

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Score each pair once under the reference, into a file that survives us: the reference never changes."""
        path, n, rank = self.folder / f"reference_{name}.jsonl", *self._of_ranks()
        known = {entry["row"]: entry for entry in ranks.from_first(n, lambda: _read_lines(path))}
        said = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
        length = [len(row["prompt_ids"]) + most for row, most in zip(dataset, said, strict=True)]
        rows = [i for i in range(len(dataset)) if said[i]]
        todo = sorted((i for i in rows if i not in known), key=lambda i: -length[i])
        model = (self.ref_model or self.model).eval()
        for start in range(0, len(todo), n * batch_size):
            # a rank for which nothing is left scores what another does: the passes of a split model are common
            mine = todo[start + rank * batch_size :][:batch_size] or todo[start : start + 1]
            batch = self._prepare_inputs(self.data_collator([dataset[i] for i in mine]))
            scores = zip(mine, *(logps.tolist() for logps in self.compute_ref_log_probs(model, batch)), strict=True)
            found = [{"row": row, "chosen": chosen, "rejected": rejected} for row, chosen, rejected in scores]
            entries = {entry["row"]: entry for part in reversed(ranks.from_all(n, found)) for entry in part}
            if rank == 0:
                with path.open("a") as file:
                    file.writelines(json.dumps(entry) + "\n" for entry in entries.values())
            known |= entries
            self.report(event="reference", done=len(known), total=len(rows))
        for role in ("chosen", "rejected"):
            dataset = dataset.add_column(
                f"ref_{role}_logps", [known[i][role] if said[i] else 0.0 for i in range(len(said))]
            )
        return dataset

    def _of_ranks(self) -> tuple[int, int]:
        """Return how many ranks there are, and which this is."""
        return self.accelerator.num_processes, self.accelerator.process_index

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """Let TRL pass the batch through the model and keep its metrics; put our loss in the place of its own."""
        if self.plain:
            return super()._compute_loss(model, inputs, return_outputs)
        outputs: list[Any] = []

        def overheard(**asked: Any) -> Any:
            outputs.append(model(**asked))
            return outputs[-1]

        given = {name: inputs[name] for name in self.beside}
        texts = {name: value for name, value in inputs.items() if name not in given}
        theirs = super()._compute_loss(overheard, texts, return_outputs)
        # of each completion the log-probabilities of its tokens, [2B, T - 1], 0 elsewhere
        policy = losses.LogProbs(*outputs[0].log_probs.sum(dim=1).chunk(2))
        ours = self._of_rows(model, policy, texts, given).mean()
        return (theirs[0] + ours, theirs[1]) if return_outputs else theirs + ours

    def _of_rows(self, model: Any, policy: losses.LogProbs, texts: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """Losses of the rows, [B]."""
        chosen_mask, _ = texts["completion_mask"].chunk(2)
        return losses.of_rows(policy, _reference(texts), chosen_mask.sum(dim=1), given, self.settings)


class Scir(Dpo):
    """Pairs without labels: the model is asked which response is better, too, in a second pass (losses.scir)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beside += _ASKED
        self.data_collator = _with_questions(self.data_collator)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        loss = super()._compute_loss(model, inputs, return_outputs)
        for name in _OF_LABELS:
            self._metrics[self.mode].pop(name, None)
        return loss

    def _of_rows(self, model: Any, policy: losses.LogProbs, texts: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
        reference, how = _reference(texts), self.settings.scir
        ratios = losses.LogProbs(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
        rows, seen = losses.scir(
            ratios, self._verdicts(model, given), how, beta=self.settings.beta,
            warming_up=self.state.global_step < how.warmup * self.state.max_steps,
        )  # fmt: skip
        told = texts["completion_mask"].any(dim=1).chunk(2)[0]
        means = self.accelerator.gather((torch.stack(list(seen.values())) * told)[None].mean(dim=-1)).mean(dim=0)
        for name, value in zip(seen, means.tolist(), strict=True):
            self._metrics[self.mode][f"scir/{name}"].append(value)
        return given["weight"] * rows

    def _verdicts(self, model: Any, given: dict[str, torch.Tensor]) -> losses.Verdicts:
        """Ask of each pair, in both orders, and compare two tokens where the answer would begin."""
        ids, mask, choices = (given[name] for name in _ASKED)
        places, which = (mask.sum(dim=1) - 1).unique(return_inverse=True)
        with exact(self.accelerator.unwrap_model(self.model).get_output_embeddings()):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=places).logits
        of_a, of_b = logits[torch.arange(len(ids), device=ids.device), which].gather(1, choices).unbind(dim=1)
        chosen_first, rejected_first = (of_a - of_b).chunk(2)
        return losses.Verdicts(chosen_first, -rejected_first)


def _reference(texts: Any) -> losses.LogProbs:
    return losses.LogProbs(texts["ref_chosen_logps"], texts["ref_rejected_logps"])


def _with_questions(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Collate as before, and bring along what the model is asked of each pair."""

    def collate_all(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        asked = [row[name] for name in QUESTIONS for row in examples]
        ids = [torch.tensor(prompt) for prompt, _ in asked]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        choices = torch.tensor([tokens for _, tokens in asked])
        given = (pad(ids), pad([torch.ones_like(row) for row in ids]), choices)
        return collate(examples) | dict(zip(_ASKED, given, strict=True))

    return collate_all


def _with_numbers(collate: Callable[[Any], Any], names: Sequence[str]) -> Callable[[Any], Any]:
    """Collate as before, and bring along columns of numbers, which TRL's collator leaves behind."""

    def collate_all(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return collate(examples) | {name: torch.tensor([float(row[name]) for row in examples]) for name in names}

    return collate_all


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a JSON-lines file; what a kill left of its last line is cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def is_plain(settings: DpoConfig, rows: Iterable[Tokenized]) -> bool:
    """Whether the loss is DPO's own: every pair is certain and weighs 1, and nothing is added."""
    hard = {"label": 1, "weight": 1}
    return (settings.loss, settings.nll) == ("sigmoid", 0) and all(row.numbers.items() >= hard.items() for row in rows)
