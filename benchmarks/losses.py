"""The losses of a pair against plain DPO: the same model, pairs and batches, trained in turn step by step.

Four trainers share one model and its optimizer, and each batch goes through every one of them before the next: between
whole trainings a machine can change its pace by more than any loss costs. What is held together is each single step.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks import training
from benchmarks.sides import Comparison, say, stopwatch
from benchmarks.workload import small_model
from srlm_core import store
from srlm_core.config import DpoConfig
from srlm_core.engines import hardware
from srlm_core.engines.training_job import TrainingJob


class Size(NamedTuple):
    pairs: int
    batch: int
    max_length: int


SIZES = {"cpu": Size(12, 2, 512), "gpu": Size(128, 8, 1024)}


class Side(NamedTuple):
    """What is asked of the trainer, and what stands beside each pair."""

    name: str
    settings: dict[str, Any]
    numbers: dict[str, float]


PLAIN = Side("DPO", {}, {})
OTHERS = (
    Side("soft labels (CREAM)", {}, {"label": 5 / 6}),
    Side("SPPO", {"loss": "sppo", "beta": 1e-3}, {"chosen_score": 0.75, "rejected_score": 0.25}),
    Side("DPO + NLL (IRPO)", {"nll": 1.0}, {}),
)


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Train on all batches in each round."""
    made = [Comparison(f"a step of {side.name}", side.name, PLAIN.name, "s", "at most", 1.05) for side in OTHERS]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {side.name: open_trainer(side, size, Path(folder)) for side in (PLAIN, *OTHERS)}
        share(trainers)
        for r in range(rounds):
            for took in side_by_side(trainers, r):
                say(f"losses: round {r + 1}/{rounds}: {took}")
                for comparison in made:
                    comparison.ours.append(took[comparison.ours_is])
                    comparison.theirs.append(took[PLAIN.name])
    return made


def share(trainers: dict[str, Any]) -> None:
    """Give all trainers the model and optimizer of the plain one, and take the step that makes the latter's memory."""
    plain = trainers[PLAIN.name]
    plain.create_optimizer()
    plain.model.train()
    for trainer in trainers.values():
        trainer.model = trainer.model_wrapped = plain.model
        trainer.optimizer = plain.optimizer
    step_s(plain, next(iter(plain.get_train_dataloader())))


def side_by_side(trainers: dict[str, Any], r: int) -> Iterator[dict[str, float]]:
    """Seconds of each batch's step by side; who comes first changes from batch to batch, and from round to round."""
    names = list(trainers)
    loaders = (trainer.get_train_dataloader() for trainer in trainers.values())
    for i, batches in enumerate(zip(*loaders, strict=True)):
        of_side = dict(zip(names, batches, strict=True))
        first = (r + i) % len(names)
        yield {name: step_s(trainers[name], of_side[name]) for name in names[first:] + names[:first]}


def step_s(trainer: Any, batch: Any) -> float:
    """Take one step: forward, backward, the optimizer's part."""
    with stopwatch() as seconds:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        loss.item()  # a GPU is done when it has said this
        return round(seconds(), 4)


def open_trainer(side: Side, size: Size, folder: Path) -> Any:
    """Open the training child's own trainer, in this process; every side has the same batches."""
    import torch
    from transformers import AutoTokenizer

    from srlm_core.engines import trl

    torch.set_num_threads(len(hardware.cores()))
    work = folder / side.name
    store.write_part(work / "rows.parquet", pairs(side, size), "benchmark")
    settings = DpoConfig(
        batch_size=size.batch, micro_batch_size=size.batch, max_length=size.max_length, **side.settings
    )
    job = TrainingJob(
        kind="dpo", rows=work / "rows.parquet", init_from=small_model(), output=work / "model", work_dir=work,
        threads=len(hardware.cores()), settings=settings,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(job.init_from)
    rows, _, _ = trl.load_rows(job, tokenizer, trl.Report())
    return trl.make_trainer(job, rows, [], tokenizer, trl.Report())


def pairs(side: Side, size: Size) -> pa.Table:
    """The training benchmark's pairs, with this side's numbers beside them."""
    table = training.lessons("dpo", training.Size(0, size.pairs, size.batch, size.batch, size.max_length))
    for name, value in side.numbers.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.repeat(value, table.num_rows))
    return table
