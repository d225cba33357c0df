"""The loop's own cost: everything but model and trainer, on the scripted engine, sampling to pairs and report."""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.sides import Comparison, allowed, in_turn, say


class Size(NamedTuple):
    prompts: int
    n: int
    k: int
    shard_rows: int
    times: int
    """How many times the rows the large side has."""


SIZES = {"cpu": Size(5_000, 7, 11, 64, 10), "gpu": Size(5_000, 7, 11, 64, 10)}


class Took(NamedTuple):
    seconds: float
    gib: float
    """Most that the campaign and all processes it started held together."""


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Run the campaign with and without the two servers, then once at several times the rows."""
    seen: dict[str, list[Took]] = {"plain": [], "shown": [], "large": []}

    def side(name: str, prompts: int, *flags: str) -> float:
        took = campaign(size, prompts, *flags)
        say(f"loop, {name}: {prompts} prompts in {took.seconds:.1f} s, {took.gib:.2f} GiB")
        seen[name].append(took)
        return took.seconds

    alone = ("--no-prefect", "--no-mlflow")
    rows = f"{size.prompts} prompts x {size.n} responses x {size.k} judgments"
    shown = Comparison(f"loop, {rows}", "shown by Prefect, recorded by MLflow", "files only", "s", "at most", 2.0)
    in_turn(lambda r: side("shown", size.prompts), [(shown, lambda r: side("plain", size.prompts, *alone))], rounds)
    shown.also = {"GiB of files only": [took.gib for took in seen["plain"]]}
    bounds = [
        allowed(f"loop, {rows}: time", [took.seconds for took in seen["shown"]], 300, "s"),
        allowed(f"loop, {rows}: memory", [took.gib for took in seen["shown"]], 1.5, "GiB"),
    ]
    side("large", size.prompts * size.times, *alone)
    many, few, more = seen["large"][0], seen["plain"], f"loop, {size.times} times the rows, files only"
    longer = Comparison(f"{more}: time", "large, once", "small, median", "s", "at most", 1.1 * size.times)
    longer.ours, longer.theirs = [many.seconds], [statistics.median(took.seconds for took in few)]
    larger = Comparison(f"{more}: memory", "large, once", "small, median", "GiB", "at most", 1.1)
    larger.ours, larger.theirs = [many.gib], [statistics.median(took.gib for took in few)]
    return [shown, *bounds, longer, larger]


def campaign(size: Size, prompts: int, *flags: str) -> Took:
    """Run one iteration as a user would, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return command(Path(folder), "self_rewarding", size, prompts, {}, *flags)


def command(folder: Path, recipe: str, size: Size, prompts: int, chosen: Mapping[str, object], *flags: str) -> Took:
    """Run one iteration by the command line, and watch its processes' memory."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{text}\n" for text in distinct(prompts)))
    chosen = {
        "iterations": 1, "prompts.target": prompts, "prompts.file": f'"{file}"', "prompts.file_share": 1.0,
        "responses.n": size.n, "judgments.k": size.k, "engine.shard_rows": size.shard_rows,
        "evaluation.models": '"none"', **chosen,
    }  # fmt: skip
    settings = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    words = ["run", recipe, "--size", "smoke", "--root", str(folder), *settings, *flags]
    began = time.perf_counter()
    with (folder / "log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-m", "flows.cli", *words], stdout=log, stderr=log)
        most = 0
        while child.poll() is None:
            most = max(most, _resident(child.pid))
            time.sleep(0.2)
    if child.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    return Took(round(time.perf_counter() - began, 2), round(most / 2**30, 3))


def _resident(pid: int) -> int:
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def distinct(n: int) -> list[str]:
    """Make prompts that differ enough to pass the similarity filter."""
    rng = random.Random(n)
    words = ["".join(rng.choice("bdfglmnprstv") + rng.choice("aeiou") for _ in range(3)) for _ in range(8_000)]
    shape = "How does a {} {} with the {} near {} make its {} {}?"
    return [shape.format(*rng.sample(words, 6)) for _ in range(n)]
