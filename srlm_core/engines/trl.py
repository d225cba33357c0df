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
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srlm_core.config import DpoConfig, OnlineConfig, RewardConfig, SftConfig
from srlm_core.engines import hardware
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.training_job import TrainingJob, TrainingResult, refuses, split
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

import torch
import transformers
import trl.trainer.utils
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import TrainerState

from srlm_core.engines import ranks
from srlm_core.engines.callbacks import CHECKS, Checkpoints, EarlyStop, Epochs, Log, Report, steps_of
from srlm_core.engines.packed import pack
from srlm_core.engines.trainers import StepSampler
from srlm_core.engines.training_rows import Tokenized, as_dataset, blank_rows, load_rows, read_rows

# TRL projects onto the vocabulary only the positions that have a loss, but on CPU all of them. Same numbers, less work.
trl.trainer.utils._use_triton = lambda device: True  # pyright: ignore[reportPrivateImportUsage]

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                    "*.jinja", "chat_templates", "*.tiktoken", "*.py")  # fmt: skip


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
    metric, more_is_better = CHECKS[job.kind]
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
        trainer: Any = _sft_trainer(job, words, given)
    elif isinstance(job.settings, DpoConfig):
        trainer = _preference_trainer(job, job.settings, [*rows, *checked], words, given | {"report": report})
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


def _sft_trainer(job: TrainingJob, words: dict[str, Any], given: dict[str, Any]) -> Any:
    from trl.trainer.sft_config import SFTConfig

    from srlm_core.engines.sft_training import Sft

    return Sft(model=load_model(job.init_from, job), args=SFTConfig(**words), **given)


def _preference_trainer(
    job: TrainingJob, settings: DpoConfig, rows: Sequence[Tokenized], words: dict[str, Any], given: dict[str, Any]
) -> Any:
    from trl.trainer.dpo_config import DPOConfig

    from srlm_core.engines.dpo_training import Dpo, Scir, is_plain

    reference = job.reference or job.init_from
    is_itself = reference.resolve() == job.init_from.resolve()
    words |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2 * split(settings, job.ranks)[0]}
    words |= {"remove_unused_columns": False}  # every column of ours is there to be used
    return (Dpo if settings.labelled else Scir)(
        model=load_model(job.init_from, job), args=DPOConfig(beta=settings.beta, **words),
        ref_model=None if is_itself else load_model(reference, job),
        settings=settings, plain=is_plain(settings, rows), folder=job.work_dir, **given,
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
