"""What happens between the steps of a training: checkpoints, held-out checks, the log, and word of it to the parent.

Imported by the training child alone, which pays for transformers at the top (engines/trl.py).
"""

import json
import math
import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from srlm_core.engines import ranks
from srlm_core.engines.child import channel_to_parent
from srlm_core.engines.trainers import StepSampler
from srlm_core.engines.training_job import TrainingJob
from srlm_core.errors import TrainingFailed

CHECKS = {
    "sft": ("eval_loss", False), "dpo": ("eval_rewards/accuracies", True), "reward": ("eval_accuracy", True),
    "online": ("eval_reward", True),
}  # fmt: skip
"""The held-out check of each kind, and whether more is better."""


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
        self.metric, self.more_is_better = CHECKS[job.kind]
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
        metric = CHECKS[self.job.kind][0]
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
