"""The training child: `python -m srlm_core.engines.trl job.json` trains one model through TRL, and ends.

Three things are kept true. Nothing is cut: a row that is too long is left out, and said so. The weights are float32
while they are updated, whatever the arithmetic. A run that was killed and started again ends with the weights of
one that was not: what a step sees depends on the seed, the epoch and the step alone.

Only this child imports the module: it pays for torch, transformers and TRL at the top.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from srlm_core import schemas
from srlm_core.config import DpoConfig, OnlineConfig, RewardConfig, SftConfig
from srlm_core.engines import hardware
from srlm_core.engines.child import channel_to_parent
from srlm_core.engines.rendering import Asked, Renderer
from srlm_core.engines.training_job import DroppedRow, TrainingJob, TrainingResult, refuses, split
from srlm_core.errors import SrlmError, TrainingFailed

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", DISABLE_MLFLOW_INTEGRATION="TRUE",
    WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="true", TQDM_DISABLE="1", ACCELERATE_DISABLE_RICH="1",
)  # fmt: skip
if __name__ == "__main__":
    # transformers imports what it finds and training never calls: a second and a half of start-up
    sampler = () if '"vllm": true' in Path(sys.argv[1]).read_text() else ("vllm",)
    for unused in ("sklearn", "scipy", *sampler, "deepspeed", "mlflow", "wandb"):
        sys.modules[unused] = None  # type: ignore[assignment]
    # transformers and TRL each read the metadata of every installed package: once is enough
    importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import trl.trainer.dpo_trainer
import trl.trainer.utils
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from transformers.trainer_callback import TrainerState
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from srlm_core.engines import losses, ranks
from srlm_core.engines.packed import pack
from srlm_core.engines.trainers import BLANK, ByRow, Ours, StepSampler

# TRL projects onto the vocabulary only the positions that have a loss, but on CPU all of them. Same numbers, less work.
trl.trainer.utils._use_triton = lambda device: True  # pyright: ignore[reportPrivateImportUsage]
# Names a cache that we do not use, at the price of reading every weight
trl.trainer.dpo_trainer.hash_module = lambda module: ""  # pyright: ignore[reportPrivateImportUsage]

_COMPLETIONS = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "reward": (), "online": ()}
_NUMBERS = {"sft": (), "dpo": ("label", "weight", "chosen_score", "rejected_score"), "reward": (), "online": ()}
_RANKED = {"reward": ("responses", "ranks")}
_QUESTIONS = ("asked_ab", "asked_ba")
"""Which of the two is better, chosen shown first and rejected shown first; for a loss that asks the model."""
_ASKED = ("question_ids", "question_mask", "question_choices")
"""The same in a batch: [2B, Q] token ids, padded on the right, all of `asked_ab` first; [2B, Q]; [2B, 2] token ids."""
_OF_LABELS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip
"""TRL's metrics that say nothing where nobody knows which response is the better one."""
_EXPECTED = {
    "label": ("a number from 0 to 1, the probability that chosen is better", "Write 1 for a pair that is certain."),
    "weight": ("a number from 0 up, how much the row counts", "Write 1 for a row like any other."),
    **dict.fromkeys(
        ("chosen_score", "rejected_score"),
        ("a number from 0 to 1, the probability of winning", "Give such scores, or set training.dpo.loss=sigmoid."),
    ),
}
"""What must stand beside a pair that is trained on, and what to do where it does not."""
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                    "*.jinja", "chat_templates", "*.tiktoken", "*.py")  # fmt: skip
_CHECKS = {
    "sft": ("eval_loss", False), "dpo": ("eval_rewards/accuracies", True), "reward": ("eval_accuracy", True),
    "online": ("eval_reward", True),
}  # fmt: skip
"""The held-out check of each kind, and whether more is better."""


# ---------------------------------------------------------------------------------------------------- rows to tokens


class Tokenized(NamedTuple):
    """A row as the trainer wants it: token ids of the prompt and of each completion."""

    id: str
    prompt: list[int]
    completions: tuple[list[int], ...]
    numbers: dict[str, float | None]
    """What stands beside the texts: label, weight and scores of a pair."""
    questions: tuple[Asked, ...] = ()
    """What the loss asks the model of a pair, in both orders, up to where it would say `A` or `B`; and those tokens."""
    ranks: tuple[int, ...] = ()
    """Of a ranking's texts, which stand as completions of no prompt: 0 = best."""
    room: int = 0
    """Most tokens of a completion that is still to be sampled."""
    messages: Sequence[dict[str, str]] = ()
    """What is asked, for a trainer that renders it itself."""

    @property
    def n_tokens(self) -> int:
        """Length of the longest sequence that training would see."""
        return max(
            len(self.prompt) + max(map(len, self.completions), default=self.room),
            *(len(asked.prompt) for asked in self.questions), 0,
        )  # fmt: skip


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read a job's Parquet file; raises TrainingFailed with words if it is not one."""
    columns = ["id", "prompt", *_COMPLETIONS[kind], *_NUMBERS[kind], *_RANKED.get(kind, ())]
    try:
        found = pq.read_schema(path).names
        if missing := [column for column in columns if column not in found]:
            raise TrainingFailed(
                f"training ({kind}): expected the columns {', '.join(columns)} in {path}, got {', '.join(found)}; "
                f"missing: {', '.join(missing)}. Make the rows again."
            )
        columns += [column for column in _QUESTIONS if column in found]
        rows = pq.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise TrainingFailed(
            f"training ({kind}): expected a Parquet file of rows at {path}, got: {error}. Make the rows again."
        ) from error
    if not rows:
        raise TrainingFailed(
            f"training ({kind}): expected rows in {path}, got none. Nothing can be learnt from no row."
        )
    return rows


def check_numbers(row: dict[str, Any], settings: DpoConfig) -> None:
    """Raise TrainingFailed unless what the loss reads beside the texts is there and in its range."""
    for name in losses.reads(settings):
        value, most = row[name], sys.float_info.max if name == "weight" else 1.0
        if not isinstance(value, int | float) or not 0 <= value <= most:
            expected, remedy = _EXPECTED[name]
            raise TrainingFailed(
                f"training (dpo): expected {name} to be {expected}, as loss={settings.loss} reads it, got "
                f"{'null' if value is None else value} (row {row['id']}). {remedy}"
            )


def tokenize(row: dict[str, Any], kind: str, tokenizer: Any, ends: set[int]) -> Tokenized:
    """Render a row with the chat template: the prompt up to where the assistant speaks, then each completion.

    A completion goes from there to its end-of-turn token, which is its last token: exactly what sampling draws. It is
    tokenized apart from the prompt, as it was when it was drawn.
    """
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    completions = []
    for column in _COMPLETIONS[kind]:
        text = tokenizer.apply_chat_template(row["prompt"] + row[column], tokenize=False)
        if not text.startswith(prompt):
            raise TrainingFailed(
                f"training: expected the chat template to render a prompt as the beginning of prompt and response, got "
                f"{text[: len(prompt)][-80:]!r} where the prompt ends with {prompt[-80:]!r} (row {row['id']}). "
                "The model would be trained on another context than it answers in: mend the chat template."
            )
        ids = _ids(tokenizer, text[len(prompt) :])
        last = max((i for i, token in enumerate(ids) if token in ends), default=None)
        if last is None:
            raise TrainingFailed(
                f"training: expected the chat template to end the assistant's turn with an end-of-turn token "
                f"({', '.join(tokenizer.convert_ids_to_tokens(sorted(ends)))}), got {text[len(prompt) :][-40:]!r} "
                f"(row {row['id']}). A model trained on this never stops: set eos_token to what the template writes."
            )
        completions.append(ids[: last + 1])
    numbers = {name: row[name] for name in _NUMBERS[kind]}
    return Tokenized(row["id"], _ids(tokenizer, prompt), tuple(completions), numbers)


def questions(row: dict[str, Any], renderer: Renderer) -> tuple[Asked, ...]:
    """Render what the loss asks of a pair, as an engine does; raises TrainingFailed where there is no question."""
    if missing := [name for name in _QUESTIONS if not row.get(name)]:
        raise TrainingFailed(
            f"training (dpo): expected {missing[0]} to ask which response is better, as loss=scir puts it to the "
            f"model, got null (row {row['id']}). Lay the rows out for this loss, or set another training.dpo.loss."
        )
    return tuple(renderer.choices(row[name], schemas.BETTER_LINE, schemas.SHOWN) for name in _QUESTIONS)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(tokenizer: Any, generation: GenerationConfig) -> set[int]:
    """Tokens that end an assistant's turn: what generation stops at."""
    declared = generation.eos_token_id
    ends = {declared} if isinstance(declared, int) else set(declared or ())
    return ends | ({tokenizer.eos_token_id} - {None})


def as_dataset(rows: Sequence[Tokenized], kind: str) -> Dataset:
    """Columns as the trainer names them, tokenized; a trainer that samples is given messages."""
    if kind == "online":
        return Dataset.from_list([{"prompt": row.messages} for row in rows])
    if kind == "reward":
        return Dataset.from_dict({
            "texts": [row.completions for row in rows], "ranks": [row.ranks for row in rows],
        })  # fmt: skip
    if kind == "sft":
        return Dataset.from_dict({
            "input_ids": [row.prompt + row.completions[0] for row in rows],
            "labels": [[-100] * len(row.prompt) + row.completions[0] for row in rows],
        })  # fmt: skip
    return Dataset.from_dict({
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.completions[0] for row in rows],
        "rejected_ids": [row.completions[1] for row in rows],
        **{name: [row.numbers[name] for row in rows] for name in _NUMBERS[kind]},
        **{name: [list(row.questions[i]) for row in rows] for i, name in enumerate(_QUESTIONS) if rows[0].questions},
    })  # fmt: skip


# --------------------------------------------------------------------------------------------------------- trainers


class _Sft(Ours, SFTTrainer):
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


class _Dpo(ByRow, DPOTrainer):
    """DPOTrainer on rows that are tokenized already.

    Where each pair is certain and weighs 1 and nothing but DPO's own loss is asked for, that is TRL's, untouched.
    """

    def __init__(
        self, *args: Any, settings: DpoConfig, plain: bool, folder: Path, report: "Report", **kwargs: Any
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


class _Scir(_Dpo):
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
        with _exact(self.accelerator.unwrap_model(self.model).get_output_embeddings()):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=places).logits
        of_a, of_b = logits[torch.arange(len(ids), device=ids.device), which].gather(1, choices).unbind(dim=1)
        chosen_first, rejected_first = (of_a - of_b).chunk(2)
        return losses.Verdicts(chosen_first, -rejected_first)


@contextmanager
def _exact(head: Any) -> Iterator[None]:
    """Have the head project in float32: rounded to bfloat16, logits around 20 are eighths, and their difference is."""

    def again(head: Any, given: Any, rounded: torch.Tensor) -> torch.Tensor:
        with torch.autocast(rounded.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(given[0].float(), head.weight.float(), bias)

    hook = head.register_forward_hook(again)
    try:
        yield
    finally:
        hook.remove()


def _reference(texts: Any) -> losses.LogProbs:
    return losses.LogProbs(texts["ref_chosen_logps"], texts["ref_rejected_logps"])


def _with_questions(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Collate as before, and bring along what the model is asked of each pair."""

    def collate_all(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        asked = [row[name] for name in _QUESTIONS for row in examples]
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


def is_plain(settings: DpoConfig, rows: Iterable[Tokenized]) -> bool:
    """Whether the loss is DPO's own: every pair is certain and weighs 1, and nothing is added."""
    hard = {"label": 1, "weight": 1}
    return (settings.loss, settings.nll) == ("sigmoid", 0) and all(row.numbers.items() >= hard.items() for row in rows)


# ---------------------------------------------------------------------------------- what happens between the steps


class Report:
    """Tell the parent what happens; without a parent, as when run by hand, nobody. Of ranks the first speaks."""

    def __init__(self, job: TrainingJob | None = None) -> None:
        """Take the job of several ranks, which have a file to speak through."""
        self._file = job.said if job is not None and job.launcher != "single" and ranks.first() else None
        try:
            self._channel = channel_to_parent()
        except KeyError:
            self._channel = None

    def __call__(self, **event: Any) -> None:
        if self._channel is not None:
            self._channel.send(json.dumps(event).encode())
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(event) + "\n")


class Checkpoints(TrainerCallback):
    """Save when time or steps say so, and check the held-out rows at the steps and at the end."""

    def __init__(self, job: TrainingJob, report: Report) -> None:
        self.settings, self.heldout, self.report = job.settings, job.heldout is not None, report
        self.ranks, self.saved_at = job.ranks, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, and for a check where one is due; ranks save together, by the first one's clock."""
        due = state.global_step % self.settings.checkpoint_steps == 0
        ends = state.global_step >= state.max_steps
        late = ranks.from_first(self.ranks, self._is_late)
        if self.heldout and (due or ends):
            control.should_evaluate = control.should_save = True
        elif not ends and (due or late):
            control.should_save = True

    def _is_late(self) -> bool:
        return time.monotonic() - self.saved_at >= self.settings.checkpoint_every_s

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the seconds from here, so that slow disks do not save all the time."""
        self.saved_at = time.monotonic()
        self.report(event="saved", step=state.global_step)


class Epochs(TrainerCallback):
    """Tell the sampler which epoch begins: of several ranks that resume, the library's own word does not reach it."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler, self.steps = sampler, math.ceil(len(sampler) / sampler.batch_size)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from the steps that were taken."""
        self.sampler.set_epoch(state.global_step // self.steps)


class EarlyStop(TrainerCallback):
    """Stop after `patience` checks without a better one; reads the log, so a resumed run decides alike."""

    def __init__(self, job: TrainingJob) -> None:
        self.metric, self.more_is_better = _CHECKS[job.kind]
        self.patience = job.settings.patience

    def is_over(self, state: TrainerState) -> bool:
        """Whether the best check lies `patience` checks back."""
        values = [row[self.metric] for row in state.log_history if self.metric in row]
        best = values.index(max(values) if self.more_is_better else min(values)) if values else 0
        return len(values) - 1 - best >= self.patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if it is time."""
        control.should_training_stop = control.should_training_stop or self.is_over(state)


class Log(TrainerCallback):
    """Write each step to log.jsonl and tell the parent; a loss that is no number ends the run."""

    def __init__(self, job: TrainingJob, report: Report) -> None:
        self.job, self.report, self.path, self.before = job, report, job.work_dir / "log.jsonl", time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the file from the checkpoint's history: steps after it will be taken again."""
        if ranks.first():
            self.path.write_text("".join(json.dumps(row) + "\n" for row in steps_of(state)))
        self.before = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest row."""
        row = state.log_history[-1]
        if not _is_step(row):
            return
        if ranks.first():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        metric = _CHECKS[self.job.kind][0]
        if metric in row:
            self.report(event="evaluated", step=row["step"], metric=metric, value=row[metric])
        if "loss" in row:
            self._tell(row, state.max_steps)

    def _tell(self, row: dict[str, Any], total: int) -> None:
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise TrainingFailed(
                f"training ({self.job.kind}): expected a finite loss at step {row['step']}, got loss={row['loss']}, "
                f"grad_norm={row['grad_norm']}. Lower learning_rate ({self.job.settings.learning_rate:g}) or "
                "max_grad_norm."
            )
        now = time.monotonic()
        self.report(event="step", step=row["step"], total_steps=total, loss=row["loss"],
                    learning_rate=row["learning_rate"], s_per_step=round(now - self.before, 3))  # fmt: skip
        self.before = now


def _is_step(row: dict[str, Any]) -> bool:
    return "loss" in row or any(name.startswith("eval_") for name in row)


def steps_of(state: TrainerState) -> list[dict[str, Any]]:
    """Rows of the log: what steps and held-out checks said, without the summary of the whole run."""
    return [row for row in state.log_history if _is_step(row)]


# ------------------------------------------------------------------------------------------------------ the run


def run(job: TrainingJob, report: Report) -> TrainingResult:
    """Train the job's model and put it in its place."""
    if refused := refuses(job.kind, job.settings, job.ranks, job.fsdp):
        raise TrainingFailed(refused)
    started = time.monotonic()
    ranks.meet(job.ranks)
    finished = ranks.from_first(job.ranks, lambda: claim(job))
    if finished is not None:
        return finished
    look_for_models(job)
    torch.set_num_threads(job.threads or max(1, len(hardware.cores()) // ranks.here()))
    tokenizer = AutoTokenizer.from_pretrained(job.init_from, trust_remote_code=job.trust_remote_code)
    rows, heldout, dropped = load_rows(job, tokenizer, report)
    checkpoint = ranks.from_first(job.ranks, lambda: last_checkpoint(job.work_dir / "checkpoints"))
    trainer = make_trainer(job, rows, heldout, tokenizer, report)
    resumed = None if checkpoint is None else int(checkpoint.name.split("-")[-1])
    if resumed is not None:
        report(event="resumed", step=resumed)
    fit(trainer, job, checkpoint)
    save(trainer, job)
    state, held = trainer.state, ranks.from_all(job.ranks, memory())
    result = TrainingResult(
        log=tuple(steps_of(state)), steps=state.global_step, epochs=state.epoch or 0.0,
        n_rows=len(rows), n_heldout=len(heldout), dropped=tuple(dropped),
        seconds=round(time.monotonic() - started, 2), resumed_from_step=resumed,
        memory_mib=max(here for here, _ in held),
        gpu_memory_mib=max((gpu for _, gpu in held if gpu is not None), default=None),
        best_step=(state.best_global_step if heldout else None) or state.global_step,
        generated_tokens=_generated(job, steps_of(state)),
        precision="bfloat16" if trainer.args.bf16 else "float32",
    )  # fmt: skip
    if ranks.first():
        (job.work_dir / "result.json").write_text(result.model_dump_json(indent=2))
        shutil.rmtree(job.work_dir / "checkpoints", ignore_errors=True)
    ranks.leave(job.ranks)
    return result


def memory() -> tuple[float, float | None]:
    """Return the most memory that this process held, MiB, and that it held on its GPU; None without one."""
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(held, 1), None if on_gpu is None else round(on_gpu, 1)


def _generated(job: TrainingJob, log: Sequence[dict[str, Any]]) -> int:
    if not isinstance(job.settings, OnlineConfig):
        return 0
    from srlm_core.engines.online_training import generated_tokens

    return generated_tokens(log, job.settings)


def claim(job: TrainingJob) -> TrainingResult | None:
    """Make the work folder this job's own, and return the result if the job is done already.

    What another job left there (other rows, other settings) is removed: going on from it would mix the two.
    """
    mark, ours = job.work_dir / "fingerprint", fingerprint(job)
    same = mark.exists() and mark.read_text() == ours
    if job.output.exists():
        if same and (job.work_dir / "result.json").exists():
            return TrainingResult.model_validate_json((job.work_dir / "result.json").read_text())
        raise TrainingFailed(
            f"training ({job.kind}): expected no folder at {job.output}, got one that this job did not finish. "
            "Move it away, or train into another folder."
        )
    if not same:
        shutil.rmtree(job.work_dir / "checkpoints", ignore_errors=True)
        for leftover in ("log.jsonl", "result.json", "reference_train.jsonl", "reference_eval.jsonl"):
            (job.work_dir / leftover).unlink(missing_ok=True)
        mark.write_text(ours)
    return None


def fingerprint(job: TrainingJob) -> str:
    """Digest of what decides the weights: the job without its paths of work, and what the rows say.

    Not who trains together: a run goes on from its checkpoint with another number of ranks. But what FSDP writes, it
    alone reads.
    """
    left_out = {"rows", "heldout", "output", "work_dir", "threads", "launcher", "ranks", "ray_address"}
    said = job.model_dump(mode="json", exclude=left_out | ({"fsdp"} if job.fsdp == "off" else set()))
    said["settings"].pop("checkpoint_every_s")
    said["texts"] = [read_rows(path, job.kind) for path in (job.rows, job.heldout) if path is not None]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load_rows(
    job: TrainingJob, tokenizer: Any, report: Report
) -> tuple[list[Tokenized], list[Tokenized], list[DroppedRow]]:
    """Tokenize rows and held-out rows; leave out, count and report first what is longer than max_length."""
    if tokenizer.chat_template is None:
        raise TrainingFailed(
            f"training ({job.kind}): expected a chat template in {job.init_from}, got none. Add a chat_template.jinja."
        )
    tokens_of = tokenizer_of(job, tokenizer)
    sources = [("too_long", job.rows)] + ([("heldout_too_long", job.heldout)] if job.heldout is not None else [])
    kept: dict[str, list[Tokenized]] = {"too_long": [], "heldout_too_long": []}
    dropped = []
    for reason, path in sources:
        for row in read_rows(path, job.kind):
            tokenized = tokens_of(row)
            if tokenized.n_tokens > job.settings.max_length:
                dropped.append(DroppedRow(tokenized.id, reason, tokenized.n_tokens))
                report(event="dropped", **dropped[-1]._asdict())
            else:
                kept[reason].append(tokenized)
    report(event="rows", n_rows=len(kept["too_long"]), n_heldout=len(kept["heldout_too_long"]), n_dropped=len(dropped))
    for reason, path in sources:
        if not kept[reason]:
            shortest = min(row.n_tokens for row in dropped if row.reason == reason)
            raise TrainingFailed(
                f"training ({job.kind}): expected rows of at most max_length={job.settings.max_length} tokens in "
                f"{path}, got none: the shortest has {shortest}. Raise max_length."
            )
    return kept["too_long"], kept["heldout_too_long"], dropped


def tokenizer_of(job: TrainingJob, tokenizer: Any) -> Callable[[dict[str, Any]], Tokenized]:
    """Return what makes tokens of a row of the job's kind."""
    settings = job.settings
    ends = end_tokens(tokenizer, _generation_config(job.init_from))
    renderer = Renderer(job.init_from, trust_remote_code=job.trust_remote_code)

    def of_row(row: dict[str, Any]) -> Tokenized:
        if isinstance(settings, RewardConfig):
            from srlm_core.engines.reward_training import texts_of

            return Tokenized(row["id"], [], texts_of(row, renderer), {}, ranks=tuple(row["ranks"]))
        if isinstance(settings, OnlineConfig):
            prompt = renderer.prompt(row["prompt"], "")
            return Tokenized(row["id"], prompt, (), {}, room=settings.sampling.max_tokens, messages=row["prompt"])
        if isinstance(settings, DpoConfig):
            check_numbers(row, settings)
        tokenized = tokenize(row, job.kind, tokenizer, ends)
        if isinstance(settings, DpoConfig) and not settings.labelled:
            return tokenized._replace(questions=questions(row, renderer))
        return tokenized

    return of_row


def _generation_config(model: Path) -> GenerationConfig:
    if (model / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(model)
    return GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(model))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; delete halves. The Trainer writes trainer_state.json last."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            complete.append((step, checkpoint))
    return max(complete)[1] if complete else None


def look_for_models(job: TrainingJob) -> None:
    """Fail early, and in plain words, where a checkpoint is not."""
    roles = (("init_from", job.init_from), ("reference", job.reference), ("reward_model", job.reward_model))
    for role, path in roles:
        if path is not None and not (path / "config.json").exists():
            raise TrainingFailed(
                f"training ({job.kind}): expected a checkpoint folder with a config.json as {role}, got {path}. "
                "Name a model that exists."
            )


def load_model(path: Path, job: TrainingJob) -> Any:
    """Load a checkpoint in float32: a step of 1e-6 is below the resolution of a bfloat16 weight."""
    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=job.trust_remote_code)
    if packs(job):
        pack(found)
    return found


def packs(job: TrainingJob) -> bool:
    """Whether batches are computed as trees: not on a GPU, where many small calls of attention are unmeasured."""
    return not torch.cuda.is_available() and not job.settings.gradient_checkpointing


def use_bfloat16(precision: str) -> bool:
    """Say whether the passes run under bfloat16 autocast; `auto` where the hardware multiplies it natively."""
    return hardware.multiplies_bfloat16() if precision == "auto" else precision == "bfloat16"


def arguments(job: TrainingJob, heldout: bool) -> dict[str, Any]:
    """The settings, in the Trainer's words."""
    settings = job.settings
    micro, accumulation = split(settings, job.ranks)
    metric, more_is_better = _CHECKS[job.kind]
    choose = {
        "eval_strategy": "steps", "eval_steps": settings.checkpoint_steps, "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps, "save_total_limit": 3, "load_best_model_at_end": True,
        "metric_for_best_model": metric, "greater_is_better": more_is_better,
    } if heldout else {"eval_strategy": "no", "save_strategy": "no", "save_total_limit": 2}  # fmt: skip
    return choose | {
        "output_dir": str(job.work_dir / "checkpoints"), "seed": job.seed, "data_seed": job.seed,
        "learning_rate": settings.learning_rate, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": settings.final_learning_rate}, "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay, "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.epochs, "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro, "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "bf16": use_bfloat16(settings.precision), "use_cpu": not torch.cuda.is_available(), "max_length": None,
        "logging_steps": 1, "logging_nan_inf_filter": False, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(), "prediction_loss_only": True,
    } | split_models(job)  # fmt: skip


def split_models(job: TrainingJob) -> dict[str, Any]:
    """What ranks split, in the Trainer's words. Not tried on GPUs yet: FSDP2 as transformers and accelerate say."""
    if job.fsdp == "off":
        # every weight has a gradient in every pass: there is nothing to look for
        return {"ddp_find_unused_parameters": False} if job.ranks > 1 else {}
    recompute = job.settings.gradient_checkpointing  # FSDP does this itself
    how = {"version": 2, "reshard_after_forward": job.fsdp == "full_shard", "state_dict_type": "SHARDED_STATE_DICT"}
    return {
        "fsdp": True, "fsdp_config": how | {"activation_checkpointing": recompute},
        "gradient_checkpointing": False, "gradient_checkpointing_kwargs": None,
    }  # fmt: skip


def blank_rows(rows: Sequence[Tokenized], multiple: int) -> list[Tokenized]:
    """Rows that say nothing, as many as are missing to a multiple (trainers.Ours)."""
    seen = rows[0]
    numbers: dict[str, float | None] = dict.fromkeys(seen.numbers, 0.0)  # the weight with them
    nothing = tuple([] for _ in seen.completions)
    blank = seen._replace(id="", prompt=seen.prompt[:1] * BLANK, completions=nothing, numbers=numbers)
    if seen.ranks:  # a reward model is shown one text, which is no better than any other
        blank = blank._replace(completions=(seen.completions[0][:BLANK],), ranks=(0,))
    return [blank] * (-len(rows) % multiple)


def make_trainer(
    job: TrainingJob, rows: list[Tokenized], heldout: list[Tokenized], tokenizer: Any, report: Report
) -> Any:
    """Put model, rows and settings into TRL's trainer."""
    several, micro = job.ranks > 1, split(job.settings, job.ranks)[0]
    blanks = blank_rows(rows, job.settings.batch_size) if several else []
    checked = [*heldout, *(blank_rows(heldout, micro * job.ranks) if several and heldout else [])]
    lengths, rows = [row.n_tokens for row in rows], [*rows, *blanks]
    given: dict[str, Any] = {
        "processing_class": tokenizer, "peft_config": lora(job), "train_dataset": as_dataset(rows, job.kind),
        "eval_dataset": as_dataset(checked, job.kind) if checked else None,
        "callbacks": [Log(job, report), Checkpoints(job, report), *([EarlyStop(job)] if heldout else [])],
    }  # fmt: skip
    words = arguments(job, bool(heldout))
    if isinstance(job.settings, SftConfig):
        trainer: Any = _Sft(model=load_model(job.init_from, job), args=SFTConfig(**words), **given)
    elif isinstance(job.settings, DpoConfig):
        trainer = _preference_trainer(job, is_plain(job.settings, [*rows, *checked]), words, given, report)
    elif isinstance(job.settings, RewardConfig):
        trainer = _reward_trainer(job, job.settings, words, given)
    else:
        trainer = _online_trainer(job, job.settings, len(rows), words, given)
    trainer.sampler = StepSampler(lengths, job.settings.batch_size, job.seed, len(blanks))
    if several:
        trainer.add_callback(Epochs(trainer.sampler))
    if len(heldout) < len(checked):
        trainer.checked_share = len(heldout) / len(checked)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _preference_trainer(
    job: TrainingJob, plain: bool, words: dict[str, Any], given: dict[str, Any], report: Report
) -> Any:
    assert isinstance(job.settings, DpoConfig)
    reference = job.reference or job.init_from
    is_itself = reference.resolve() == job.init_from.resolve()
    words |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2 * split(job.settings, job.ranks)[0]}
    words |= {"remove_unused_columns": False}  # every column of ours is there to be used
    return (_Dpo if job.settings.labelled else _Scir)(
        model=load_model(job.init_from, job), args=DPOConfig(beta=job.settings.beta, **words),
        ref_model=None if is_itself else load_model(reference, job),
        settings=job.settings, plain=plain, folder=job.work_dir, report=report, **given,
    )  # fmt: skip


def _reward_trainer(job: TrainingJob, settings: RewardConfig, words: dict[str, Any], given: dict[str, Any]) -> Any:
    from srlm_core.engines import reward_training

    words |= {"remove_unused_columns": False}
    return reward_training.Reward(model=_reward_model(job), settings=settings, words=words, **given)


def _reward_model(job: TrainingJob) -> Any:
    from srlm_core.engines import reward_training

    renderer = Renderer(job.init_from, trust_remote_code=job.trust_remote_code)
    return reward_training.load(
        job.init_from, renderer, seed=job.seed, trust_remote_code=job.trust_remote_code, packed=packs(job)
    )


def _online_trainer(
    job: TrainingJob, settings: OnlineConfig, n_rows: int, words: dict[str, Any], given: dict[str, Any]
) -> Any:
    from srlm_core.engines import online_training

    if n_rows < settings.batch_size:
        raise TrainingFailed(
            f"training (online): expected prompts for one step at least, batch_size={settings.batch_size}, got "
            f"{n_rows}. Lower training.online.batch_size, or raise prompts.target."
        )
    assert job.reward_model is not None
    ends = Renderer(job.init_from, trust_remote_code=job.trust_remote_code).ends
    model = load_model(job.init_from, job)
    model.config._name_or_path = str(job.reference or job.init_from)  # where TRL loads the reference from
    return online_training.Online(
        model=model, args=online_training.arguments(settings, words),
        reward_funcs=online_training.rewarder(job.reward_model, ends, trust_remote_code=job.trust_remote_code),
        **given,
    )  # fmt: skip


def lora(job: TrainingJob) -> Any:
    """LoRA on every linear layer but the head, or None for full weights; a reward model's head is trained whole."""
    if job.settings.lora_rank == 0:
        return None
    from peft import LoraConfig

    rank, task = job.settings.lora_rank, "SEQ_CLS" if job.kind == "reward" else "CAUSAL_LM"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)


def fit(trainer: Any, job: TrainingJob, checkpoint: Path | None) -> None:
    """Train from the start or from a checkpoint, and end with the weights of the best check, if there are checks."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if job.heldout is not None and EarlyStop(job).is_over(state):
        # Killed between the check that ended training and the final save: a step more would be one too many
        if job.fsdp != "off":  # only training puts split weights together: come to that check once more
            fit(trainer, job, ranks.from_first(job.ranks, lambda: _without(checkpoint)))
            return
        trainer.state = state
        trainer._load_best_model()
        return
    trainer._total_train_tokens = max((row.get("num_tokens", 0) for row in state.log_history), default=0)  # TRL forgets
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _without(checkpoint: Path) -> Path | None:
    """Remove a checkpoint, and return the one before it."""
    shutil.rmtree(checkpoint)
    return last_checkpoint(checkpoint.parent)


def whole(trainer: Any, job: TrainingJob) -> Any:
    """Return the trained model, in one piece on the first rank; all ranks ask."""
    if job.fsdp == "off":
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not ranks.first():
        return None
    model = _reward_model(job) if job.kind == "reward" else load_model(job.init_from, job)
    model.load_state_dict(weights)
    return model


def save(trainer: Any, job: TrainingJob) -> None:
    """Write plain full weights, tokenizer and generation settings aside, then rename them into place."""
    model = whole(trainer, job)
    if not ranks.first():
        return
    if job.settings.lora_rank:
        model = model.merge_and_unload()
    model.config.use_cache = True
    aside = job.output.with_name(f".tmp-{job.output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model.to(getattr(torch, job.settings.save_dtype)).save_pretrained(aside)
    for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
        for source in job.init_from.glob(pattern):
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, aside / source.name)
    if job.kind == "reward":  # with the padding that it was trained with, or others would read it at another token
        trainer.processing_class.save_pretrained(aside)
    aside.rename(job.output)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a JSON-lines file; what a kill left of its last line is cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def work(job: TrainingJob) -> int:
    """Run a job, or a rank's part of it, and tell what came of it; 0 where it is done."""
    report = Report(job)
    try:
        result = run(job, report)
    except SrlmError as error:
        report(event="failed", message=str(error))
        print(error, file=sys.stderr)  # noqa: T201 the log keeps what another rank than the first has to say
        return 1
    report(event="done", result=result.model_dump(mode="json"))
    return 0


def main() -> int:
    """Run the job named on the command line."""
    done = work(TrainingJob.model_validate_json(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return done


if __name__ == "__main__":
    sys.exit(main())
