"""The other side of training: a plain script around TRL's trainers, as their documentation shows them."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.sides import stopwatch
from srlm_core.engines import hardware


def main() -> None:
    """Train what the job file says and write what it took beside the model."""
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"] or len(hardware.cores()))
    transformers.utils.logging.set_verbosity_error()
    rows = Dataset.from_parquet(job["rows"])
    rows = rows.select_columns(["prompt", *(["chosen", "rejected"] if job["kind"] == "dpo" else ["completion"])])
    on_gpu, settings = torch.cuda.is_available(), job["settings"]
    shared = {
        "output_dir": f"{job['output']}.work", "seed": job["seed"], "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": settings["final_learning_rate"]}, "weight_decay": settings["weight_decay"],
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["batch_size"] // settings["micro_batch_size"],
        "num_train_epochs": settings["epochs"], "max_length": settings["max_length"], "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": not on_gpu,
        "bf16": {"auto": hardware.multiplies_bfloat16(), "bfloat16": True, "float32": False}[settings["precision"]],
        "disable_tqdm": True,
        "gradient_checkpointing": settings["gradient_checkpointing"],
    }  # fmt: skip
    with stopwatch() as seconds:
        tokenizer = AutoTokenizer.from_pretrained(job["init_from"])
        model = AutoModelForCausalLM.from_pretrained(job["init_from"], dtype=torch.float32)
        given = {"model": model, "processing_class": tokenizer, "train_dataset": rows}
        if job["kind"] == "dpo":
            trainer: Any = DPOTrainer(args=DPOConfig(beta=settings["beta"], **shared), **given)
        else:
            trainer = SFTTrainer(args=SFTConfig(**shared), **given)
        trainer.train()
        took = seconds()
    trainer.model.save_pretrained(job["output"])
    tokenizer.save_pretrained(job["output"])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    Path(job["output"], "took.json").write_text(json.dumps({"seconds": took, "losses": losses}))


if __name__ == "__main__":
    main()
