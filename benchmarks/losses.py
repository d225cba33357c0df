"""The losses of a pair against plain DPO: the same pairs, steps and rates; what a step takes longer."""

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks import training as lessons_of
from benchmarks.sides import Comparison, say
from benchmarks.workload import small_model
from srlm_core import store
from srlm_core.config import DpoConfig
from srlm_core.engines import hardware, training_job
from srlm_core.engines.training_job import TrainingJob


class Size(NamedTuple):
    pairs: int
    batch: int
    micro: int
    max_length: int


SIZES = {"cpu": Size(16, 4, 4, 512), "gpu": Size(512, 16, 8, 1024)}


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
    """Train each way in turn, another one first in each round, and with another seed."""
    made = [Comparison(f"a step of {side.name}", side.name, PLAIN.name, "s", "at most", 1.05) for side in OTHERS]
    sides = [PLAIN, *OTHERS]
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds):
            first = r % len(sides)
            took = {side.name: step_s(side, size, r, Path(folder)) for side in sides[first:] + sides[:first]}
            say(f"losses: round {r + 1}/{rounds}: {took}")
            for comparison in made:
                comparison.ours.append(took[comparison.ours_is])
                comparison.theirs.append(took[PLAIN.name])
    return made


def step_s(side: Side, size: Size, seed: int, folder: Path) -> float:
    """Train once; median seconds of a step, without the first, which warms up, and without the reference's scores."""
    seconds: list[float] = []
    work = folder / "work"
    store.write_part(folder / "rows.parquet", _pairs(side, size), "benchmark")
    job = TrainingJob(
        kind="dpo", rows=folder / "rows.parquet", init_from=small_model(), output=work / "model", work_dir=work,
        seed=seed, threads=len(hardware.cores()),
        settings=DpoConfig(
            learning_rate=1e-6, final_learning_rate=1e-7, batch_size=size.batch, micro_batch_size=size.micro,
            max_length=size.max_length, **side.settings,
        ),
    )  # fmt: skip

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seconds.append(event["s_per_step"])

    training_job.train(job, log=folder / "log", on_progress=note)
    shutil.rmtree(work)
    return round(statistics.median(seconds[1:]), 4)


def _pairs(side: Side, size: Size) -> pa.Table:
    """The training benchmark's pairs, with this side's numbers beside them."""
    table = lessons_of.lessons("dpo", lessons_of.Size(0, size.pairs, size.batch, size.micro, size.max_length))
    for name, value in side.numbers.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.repeat(value, table.num_rows))
    return table
