"""The losses of a pair against plain DPO: the same model, pairs and batches, trained in turn step by step.

All trainers share one model and its optimizer, and each batch goes through every one of them before the next: between
whole trainings a machine can change its pace by more than any loss costs. What is held together is each single step.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks import training
from benchmarks.sides import Comparison, say, stopwatch
from benchmarks.workload import small_model
from srlm_core import comparisons, schemas, store
from srlm_core.config import DpoConfig
from srlm_core.engines import hardware
from srlm_core.engines.training_job import TrainingJob


class Size(NamedTuple):
    pairs: int
    batch: int
    max_length: int


SIZES = {"cpu": Size(12, 2, 512), "gpu": Size(128, 8, 1024)}


class Took(NamedTuple):
    """A step's seconds by the clock, and of all processors together: those of a busy machine are no one else's."""

    wall: float
    processor: float


class Side(NamedTuple):
    """What is asked of the trainer, and what stands beside each pair."""

    name: str
    settings: dict[str, Any]
    numbers: dict[str, float]
    aim: float = 1.05
    """Most that a step may take, plain DPO's being 1."""
    asks: bool = False
    """Whether the model is asked which response is better."""


PLAIN = Side("DPO", {}, {})
OTHERS = (
    Side("soft labels (CREAM)", {}, {"label": 5 / 6}),
    Side("SPPO", {"loss": "sppo", "beta": 1e-3}, {"chosen_score": 0.75, "rejected_score": 0.25}),
    Side("DPO + NLL (IRPO)", {"nll": 1.0}, {}),
    # Two questions a pair, each with the rubric and both responses: what it costs is a matter of lengths. Rows must not
    # be left out for that, or the sides would differ
    Side("SCIR-style", {"loss": "scir", "max_length": 4096}, {}, aim=4.0, asks=True),
)


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Train on all batches in each round."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the training child has it
    made = [Comparison(f"a step of {side.name}", side.name, PLAIN.name, "s", "at most", side.aim) for side in OTHERS]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {side.name: open_trainer(side, size, Path(folder)) for side in (PLAIN, *OTHERS)}
        share(trainers)
        for side, comparison in zip(OTHERS, made, strict=True):
            comparison.also["tokens of a step"] = [tokens(trainers[name]) for name in (side.name, PLAIN.name)]
        for r in range(rounds):
            for took in side_by_side(trainers, r):
                say(f"losses: round {r + 1}/{rounds}: {took}")
                for comparison in made:
                    ours, theirs = took[comparison.ours_is], took[PLAIN.name]
                    comparison.ours.append(ours.wall)
                    comparison.theirs.append(theirs.wall)
                    ratios = comparison.also.setdefault("processor seconds, ratios", [])
                    ratios.append(round(ours.processor / theirs.processor, 4))
    for comparison in made:
        found = comparison.also["processor seconds, ratios"]
        comparison.also["processor seconds, median ratio"] = round(statistics.median(found), 4)
    return made


def share(trainers: dict[str, Any]) -> None:
    """Give all trainers the model and optimizer of the plain one, and take the step that makes the latter's memory."""
    plain = trainers[PLAIN.name]
    plain.create_optimizer()
    plain.model.train()
    for trainer in trainers.values():
        trainer.model = trainer.model_wrapped = plain.model
        trainer.optimizer = plain.optimizer
        trainer.sampler = plain.sampler  # by its lengths, where a side has longer rows of its own
    step(plain, next(iter(plain.get_train_dataloader())))


def side_by_side(trainers: dict[str, Any], r: int) -> Iterator[dict[str, Took]]:
    """Each batch's step by side; who comes first changes from batch to batch, and from round to round."""
    names = list(trainers)
    loaders = (trainer.get_train_dataloader() for trainer in trainers.values())
    for i, batches in enumerate(zip(*loaders, strict=True)):
        of_side = dict(zip(names, batches, strict=True))
        first = (r + i) % len(names)
        yield {name: step(trainers[name], of_side[name]) for name in names[first:] + names[:first]}


def tokens(trainer: Any) -> float:
    """Mean tokens that a step's texts have, stretches that rows share counted once."""
    from srlm_core.engines.packed import tree

    counts: list[int] = []
    for batch in trainer.get_train_dataloader():
        for name in ("input", "question"):
            if f"{name}_ids" in batch:
                lengths = batch["attention_mask" if name == "input" else "question_mask"].sum(1).tolist()
                ids = batch[f"{name}_ids"].tolist()
                counts.append(sum(len(s.ids) for s in tree([r[:n] for r, n in zip(ids, lengths, strict=True)])))
    return round(sum(counts) / len(trainer.get_train_dataloader()), 1)


def step(trainer: Any, batch: Any) -> Took:
    """Take one step: forward, backward, the optimizer's part."""
    processor = time.process_time()
    with stopwatch() as seconds:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        loss.item()  # a GPU is done when it has said this
        return Took(round(seconds(), 4), round(time.process_time() - processor, 4))


def open_trainer(side: Side, size: Size, folder: Path) -> Any:
    """Open the training child's own trainer, in this process; every side has the same batches."""
    import torch
    from transformers import AutoTokenizer

    from srlm_core.engines import trl

    torch.set_num_threads(len(hardware.cores()))
    work = folder / side.name
    store.write_part(work / "rows.parquet", pairs(side, size), "benchmark")
    given: dict[str, Any] = {"max_length": size.max_length, **side.settings}
    settings = DpoConfig(batch_size=size.batch, micro_batch_size=size.batch, **given)
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
    return asked(table) if side.asks else table


def asked(table: pa.Table) -> pa.Table:
    """Put the question beside each pair, in both orders."""
    ask = comparisons.pairwise().ask
    rows = table.to_pylist()
    for row in rows:
        prompt, chosen, rejected = (row[name][-1]["content"] for name in ("prompt", "chosen", "rejected"))
        row["asked_ab"] = list(ask(prompt=prompt, first=chosen, second=rejected))
        row["asked_ba"] = list(ask(prompt=prompt, first=rejected, second=chosen))
    return schemas.table(rows, schemas.PREFERENCES)
