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

from srlm_core.config import DpoConfig, OnlineConfig, OptimizerConfig, RewardConfig, Settings, SftConfig
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
    """CPU threads of one rank; null = all cores, divided by the ranks of a machine."""
    launcher: Literal["single", "torchrun", "ray"] = "single"
    ranks: int = Field(default=1, ge=1)
    fsdp: Literal["off", "full_shard", "shard_grad_op"] = "off"
    """Who trains together, as in config.TrainingConfig."""
    ray_address: str | None = None
    """Ray cluster of the ranks, as in config.EngineConfig; null = RAY_ADDRESS, else a Ray of our own."""

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

    @property
    def said(self) -> Path:
        """Where the first of several ranks writes its events, a line of JSON each; launch.py reads them there."""
        return self.work_dir / "progress.jsonl"


def split(settings: OptimizerConfig, ranks: int) -> tuple[int, int]:
    """Split a step: rows of one forward pass of one rank, and passes that a rank accumulates."""
    rows = _rows_of_a_step(settings)
    micro = min(settings.micro_batch_size, max(1, rows // ranks))
    return micro, rows // (micro * ranks)


def _rows_of_a_step(settings: OptimizerConfig) -> int:
    return settings.batch_size * (settings.n if isinstance(settings, OnlineConfig) else 1)


def refuses(kind: str, settings: OptimizerConfig, ranks: int, fsdp: str) -> str | None:
    """Say why so many ranks cannot train by these settings; None where they can."""
    rows, (micro, passes) = _rows_of_a_step(settings), split(settings, ranks)
    if rows != micro * passes * ranks:
        return (
            f"training.{kind}: expected batch_size to be a multiple of micro_batch_size x training.ranks, got "
            f"{rows} and {micro} x {ranks}. Change batch_size, micro_batch_size or training.ranks."
        )
    if kind == "online" and ranks > 1:
        return (
            f"training.ranks={ranks}: what is sampled while training would depend on the number of ranks, so kind "
            "online trains with one. Set training.ranks=1."
        )
    if fsdp != "off" and (settings.lora_rank or getattr(settings, "loss", None) == "scir"):
        return (
            f"training.fsdp={fsdp} splits whole weights, and DPO's losses alone: it does not go with "
            f"training.{kind}.lora_rank={settings.lora_rank} or loss=scir. Set training.fsdp=off, or change those."
        )
    return None


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
    """Most memory the process held; of several ranks the one that held most, here and on a GPU."""
    gpu_memory_mib: float | None
    best_step: int
    """Step whose weights were saved: the last one without a held-out check."""
    generated_tokens: int = 0
    """Sampled on the way."""
    precision: Literal["float32", "bfloat16"]
    """Arithmetic that `auto` came to."""


def train(job: TrainingJob, *, log: Path, on_progress: Callable[[Progress], None] | None = None) -> TrainingResult:
    """Train in a child process, or in the several that it starts, and return when job.output exists.

    `log` receives what the child and its libraries say. Raises TrainingFailed, with the child's own words, when no
    model came of it. The child ends with this process, however this process ends.
    """
    job.work_dir.mkdir(parents=True, exist_ok=True)
    job_file = job.work_dir / "job.json"
    job_file.write_text(job.model_dump_json(indent=2))
    env = {name: value for name, value in _SURROUNDINGS.items() if name not in os.environ}
    step = 0
    module = f"srlm_core.engines.{'trl' if job.launcher == 'single' else 'launch'}"
    with Child(module, [str(job_file)], log=log, env=env, channel=True) as child:
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
