"""Meta-Rewarding's own cost: judgments compared in both orders, rated and paired, on the scripted engine."""

import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.loop import Size, command
from benchmarks.sides import Comparison, allowed, say
from srlm_core import store

SIZES = {"cpu": Size(5_000, 7, 12, 64, 1), "gpu": Size(5_000, 7, 12, 64, 1)}
"""One judgment in ten cannot be read: of twelve some eleven meet, 110 comparisons a prompt."""


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Run one iteration, and then again with judgments rated otherwise: that begins with the verdicts."""
    whole, paired, compared = [], [], []
    for r in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            alone = ("--no-prefect", "--no-mlflow")
            whole.append(command(Path(folder), "meta_rewarding", size, size.prompts, {}, *alone))
            parts = store.parts(Path(folder) / "meta_rewarding-smoke" / "iter_01" / "meta_judgments")
            compared.append(sum(pq.read_metadata(part).num_rows for part in parts))
            other = {"meta.regularisation": 0.2}
            paired.append(command(Path(folder), "meta_rewarding", size, size.prompts, other, *alone, "--redo"))
        say(f"meta, round {r + 1}: {compared[-1]} comparisons, {whole[-1]}, verdicts to pairs {paired[-1]}")
    what = f"meta-judge, {size.prompts} prompts, {size.n} responses, {size.k} judgments"
    made = [
        allowed(f"{what}: verdicts to pairs, the whole command", [t.seconds for t in paired], 180, "s"),
        allowed(f"{what}: the whole iteration, scripted sampling included", [t.seconds for t in whole], 480, "s"),
        allowed(f"{what}: memory", [t.gib for t in [*whole, *paired]], 2.0, "GiB"),
    ]
    made[0].also = {"comparisons": compared}
    return made
