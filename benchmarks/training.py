"""SFT and DPO against TRL as it comes: the same rows, batches, rates and epochs; the same training must come of it."""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from benchmarks.likeness import distances, final_losses
from benchmarks.sides import Comparison, arithmetic, in_turn, say, stopwatch
from benchmarks.workload import small_model
from srlm_core import data, judgments, schemas, store, training
from srlm_core.config import DpoConfig, OptimizerConfig, SftConfig
from srlm_core.engines import hardware, training_job
from srlm_core.engines.models import describe
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.training_job import TrainingJob

GROUPS = "SRLM_BENCH_GROUPS"
"""Environment variable: a file of ranked groups of your own ({prompt, responses: [{text, rank or quality}]})."""


class Size(NamedTuple):
    rows: int
    pairs: int
    batch: int
    micro: int
    max_length: int


SIZES = {"cpu": Size(32, 16, 8, 4, 512), "gpu": Size(2048, 1024, 16, 8, 1024)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Train the same rows both ways, with another seed in each round."""
    with tempfile.TemporaryDirectory() as folder:
        precision = "bfloat16" if hardware.multiplies_bfloat16() else "float32"
        return [side_by_side(kind, size, rounds, Path(folder) / kind, precision) for kind in ("sft", "dpo")]


def side_by_side(
    kind: Literal["sft", "dpo"], size: Size, rounds: int, folder: Path, precision: Literal["bfloat16", "float32"]
) -> Comparison:
    """Train with ours and with TRL, and say besides how like each other the models are."""
    folder.mkdir()
    rows = folder / "rows.parquet"
    laid_out = lessons(kind, size)
    n_rows = laid_out.num_rows
    store.write_part(rows, laid_out, "benchmark")
    losses: dict[str, list[list[float]]] = {"ours": [], "theirs": []}

    def job(side: str, r: int) -> TrainingJob:
        rates = {"learning_rate": 1e-5, "final_learning_rate": 1e-6, "batch_size": size.batch}
        how = {**rates, "micro_batch_size": size.micro, "max_length": size.max_length, "precision": precision}
        settings: OptimizerConfig = SftConfig(**how) if kind == "sft" else DpoConfig(**how)
        return TrainingJob(
            kind=kind, rows=rows, init_from=small_model(), output=folder / f"{side}{r}", seed=r, settings=settings,
            work_dir=folder / f"{side}{r}.work", threads=len(hardware.cores()),
        )  # fmt: skip

    def ours(r: int) -> float:
        marks: dict[str, float] = {}
        with stopwatch() as seconds:

            def mark(event: dict[str, Any]) -> None:
                marks[event["event"]] = seconds()

            done = training_job.train(job("ours", r), log=folder / f"ours{r}.log", on_progress=mark)
        losses["ours"].append([row["loss"] for row in done.log])
        return done.n_rows / (marks["step"] - marks["rows"])

    def theirs(r: int) -> float:
        asked = job("theirs", r)
        (folder / "theirs.json").write_text(asked.model_dump_json())
        with (folder / f"theirs{r}.log").open("w") as log:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
            command = [sys.executable, "-m", "benchmarks.stock", str(folder / "theirs.json")]
            if subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode:
                raise SystemExit((folder / f"theirs{r}.log").read_text()[-3000:])
        took = store.read_json(asked.output / "took.json")
        losses["theirs"].append(took["losses"])
        return n_rows / took["seconds"]

    what = f"{kind.upper()}, {n_rows} rows, steps of {size.batch}"
    made = Comparison(f"training: {what}", "ours", "TRL as it comes", "rows/s", "at least", 1.5)
    in_turn(ours, [(made, theirs)], rounds)
    if flops := arithmetic(1024, "float32"):
        # Forward, and backward of twice that; a pair's two responses also through the reference
        passes = 3 if kind == "sft" else 4
        made.limit = flops * n_rows / (passes * 2 * describe(small_model()).parameters * _tokens(laid_out))
        made.limit_is = f"the products of all rows' tokens, shared ones too, at {flops / 1e9:.0f} GFLOP/s"
    trained = {f"{side}, seed {r}": folder / f"{side}{r}" for r in range(rounds) for side in losses}
    models = {"start": small_model(), **trained}
    few = dict(itertools.islice(models.items(), 5))  # each opens an engine: two seeds of both sides will do
    made.also = {
        "first losses": {side: [round(run[0], 4) for run in runs] for side, runs in losses.items()},
        "mean losses": {side: [round(sum(run) / len(run), 4) for run in runs] for side, runs in losses.items()},
        "losses afterwards, all rows": final_losses(few, laid_out, DpoConfig().beta, folder),
        "weights apart, as shares of the way": distances(models),
    }
    say(f"{what}: {made.also}")
    return made


def _tokens(rows: pa.Table) -> int:
    renderer = Renderer(small_model())
    return sum(
        len(renderer.prompt(row["prompt"], row[side][0]["content"]))
        for row in rows.to_pylist()
        for side in row.keys() & {"completion", "chosen", "rejected"}
    )


def lessons(kind: str, size: Size) -> Any:
    """Lay out rows of naturally varied lengths: of the shipped data, or of the file that SRLM_BENCH_GROUPS names."""
    groups = _groups()
    if kind == "dpo":
        return _preferences(groups, size)
    if GROUPS in os.environ:
        chosen = [{"instruction": g["prompt"], "response": _ranked(g)[0]["text"]} for g in groups]
        return training.ift_examples(chosen[: size.rows])
    rubric = judgments.load_rubric("additive", justified=False)
    few = groups[: size.rows // 8]
    asked = {
        (group["prompt"], response["text"]): rubric.ask(prompt=group["prompt"], response=response["text"])
        for group in few
        for response in group["responses"]
    }
    examples = data.load(data.SEED / "instructions.jsonl", "examples").rows
    rows = random.Random(0).sample(examples, size.rows - 4 * len(few))
    return pa.concat_tables([training.ift_examples(rows), training.eft_examples(few, asked, "score")])


def _preferences(groups: list[dict[str, Any]], size: Size) -> Any:
    rows = []
    for group in groups[: size.pairs]:
        best, worst = _ranked(group)[0]["text"], _ranked(group)[-1]["text"]
        said = {
            name: [{"role": "assistant", "content": text}] for name, text in (("chosen", best), ("rejected", worst))
        }
        sure = {"chosen_score": None, "rejected_score": None, "label": 1.0, "weight": 1.0}
        sure |= {"asked_ab": None, "asked_ba": None}
        asked = {"id": store.digest(group["prompt"]), "prompt": [{"role": "user", "content": group["prompt"]}]}
        rows.append({**asked, **said, **sure})
    return schemas.table(rows, schemas.PREFERENCES)


def _groups() -> list[dict[str, Any]]:
    """Read groups whose texts fit the longest row on both sides, so that neither has less to do."""
    if path := os.environ.get(GROUPS):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for group in rows:  # a response without a quality has no place in an order
            group["responses"] = [r for r in group["responses"] if r.get("rank", r.get("quality")) is not None]
        fitting = [g for g in rows if len(g["responses"]) > 1 and _longest(g) < 1500]
        return random.Random(0).sample(fitting, len(fitting))
    rows = data.load(data.SEED / "ranked.jsonl", "groups", check=data.check_judged).rows
    return random.Random(0).sample(rows, len(rows))


def _longest(group: dict[str, Any]) -> int:
    return max(len(group["prompt"]) + len(response["text"]) for response in group["responses"])


def _ranked(group: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(group["responses"], key=lambda r: r["rank"] if "rank" in r else -r["quality"])
