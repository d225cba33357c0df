"""Training a model in a process of its own: the job, what comes of it, and `train`, which sees it through.

The child (engines/trl.py) does the work; this side imports nothing heavy. A job that was killed goes on from its
last complete checkpoint when `train` is called with it again, and cannot be told from one that was not.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from srlm_core.config import DpoConfig, OnlineConfig, RewardConfig, Settings, SftConfig
from srlm_core.engines.child import Child
from srlm_core.errors import TrainingFailed

Progress = dict[str, Any]
"""One event of a training run. `event` names it:
`rows` (n_rows, n_heldout, n_dropped), `dropped` (id, reason, n_tokens), `resumed` (step), `reference` (done, total),
`step` (step, total_steps, loss, learning_rate, s_per_step), `evaluated` (step, metric, value), `saved` (path)."""

_GRACE_S = 30.0
_SURROUNDINGS = {
    # Keep freed memory and ask for huge pages: on CPU a tenth of a training step went into page faults
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000",
    # Threads soon sleep at a barrier: beside another busy process the default spins most of the time away
    "GOMP_SPINCOUNT": "10000",
}
"""Environment of the child, where ours does not say otherwise."""


SETTINGS = {"sft": SftConfig, "dpo": DpoConfig, "reward": RewardConfig, "online": OnlineConfig}


class TrainingJob(Settings):
    """Everything one training run depends on."""

    kind: Literal["sft", "dpo", "reward", "online"]
    rows: Path
    """Parquet. sft: id, prompt, completion; dpo: id, prompt, chosen, rejected; all but id lists of {role, content}.
    dpo also: label and weight, chosen_score and rejected_score (engines/losses.py), null where the loss reads none;
    loss `scir` also: asked_ab and asked_ba, messages that ask which response is better, chosen or rejected first.
    reward: id, prompt, responses (texts), ranks (0 = best); online: id, prompt."""
    heldout: Path | None = None
    """Rows that choose among checkpoints, same columns; null = no early stopping."""
    init_from: Path
    """Checkpoint folder that training starts from."""
    reference: Path | None = None
    """dpo: checkpoint folder of the frozen model in the loss; null = init_from."""
    reward_model: Path | None = None
    """online: checkpoint folder of the model that rewards."""
    output: Path
    """Folder of the finished model; must not exist yet."""
    work_dir: Path
    """Checkpoints, log and reference log-probabilities, while it runs; the log stays."""
    settings: SftConfig | DpoConfig | RewardConfig | OnlineConfig
    seed: int = 0
    trust_remote_code: bool = False
    threads: int | None = Field(None, ge=1)
    """CPU threads; null = all cores."""

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Self:
        if type(self.settings) is not SETTINGS[self.kind]:
            raise ValueError(f"a job of kind {self.kind!r} came with {type(self.settings).__name__}.")
        if self.kind in ("sft", "reward") and self.reference is not None:
            raise ValueError(f"reference is for jobs of kind 'dpo' and 'online', not for {self.kind!r}.")
        if (self.kind == "online") != (self.reward_model is not None):
            raise ValueError(f"a job of kind 'online' needs a reward_model, and no other does; this is {self.kind!r}.")
        if isinstance(self.settings, DpoConfig) and not self.settings.labelled and self.heldout is not None:
            raise ValueError(f"heldout rows check by which response is better, and loss={self.settings.loss} has none.")
        return self


class DroppedRow(NamedTuple):
    """A row that was left out before training."""

    id: str
    reason: str
    """`too_long` or `heldout_too_long`."""
    n_tokens: int


class TrainingResult(Settings):
    """What a training run did."""

    log: tuple[dict[str, Any], ...]
    """One row a step (loss, learning_rate, grad_norm; dpo: rewards/*, logps/* as TRL names them), and `eval_*` rows."""
    steps: int
    epochs: float
    n_rows: int
    """Rows trained on."""
    n_heldout: int
    dropped: tuple[DroppedRow, ...]
    seconds: float
    """Wall time of the process that finished the run, start-up and final save included."""
    resumed_from_step: int | None
    memory_mib: float
    """Most memory the process held."""
    gpu_memory_mib: float | None
    best_step: int
    """Step whose weights were saved: the last one without a held-out check."""
    generated_tokens: int = 0
    """Sampled on the way."""
    precision: Literal["float32", "bfloat16"]
    """Arithmetic that `auto` came to."""


def train(job: TrainingJob, *, log: Path, on_progress: Callable[[Progress], None] | None = None) -> TrainingResult:
    """Train in a child process and return when job.output exists.

    `log` receives what the child and its libraries say. Raises TrainingFailed, with the child's own words, when no
    model came of it. The child ends with this process, however this process ends.
    """
    job.work_dir.mkdir(parents=True, exist_ok=True)
    job_file = job.work_dir / "job.json"
    job_file.write_text(job.model_dump_json(indent=2))
    env = {name: value for name, value in _SURROUNDINGS.items() if name not in os.environ}
    step = 0
    with Child("srlm_core.engines.trl", [str(job_file)], log=log, env=env, channel=True) as child:
        for event in map(json.loads, child.channel or ()):
            if event["event"] == "done":
                child.wait(_GRACE_S)
                return TrainingResult.model_validate(event["result"])
            if event["event"] == "failed":
                raise TrainingFailed(event["message"])
            step = event["step"] if event["event"] == "step" else step
            if on_progress is not None:
                on_progress(event)
        raise TrainingFailed(
            f"training ({job.kind}): expected a model in {job.output}, got none after step {step}: {child.obituary()}\n"
            f"Run again to go on from the last checkpoint in {job.work_dir}; if memory ran out, first lower "
            "micro_batch_size or set gradient_checkpointing."
        )
