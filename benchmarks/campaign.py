"""The whole demo, as `srlm run demo` runs it, against the same work as a straight script."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.sides import Comparison, in_turn, stopwatch
from benchmarks.workload import CACHE, small_model
from srlm_core import store


class Size(NamedTuple):
    recipe: str
    overrides: tuple[str, ...] = ()


SIZES = {"cpu": Size("demo"), "gpu": Size("demo")}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Run both from the same cached base model to their last evaluation; engine starts and training are in it."""
    small_model()  # unpacked before, for both
    phases: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}

    def wall(side: str, campaign: str, command: list[str]) -> float:
        with tempfile.TemporaryDirectory() as root:
            shutil.copytree(CACHE, Path(root) / ".cache" / "models")
            with (Path(root) / "log").open("w") as log, stopwatch() as seconds:
                whole = [sys.executable, "-m", *(word.replace("ROOT", root) for word in command)]
                if subprocess.run(whole, stdout=log, stderr=log, check=False).returncode:
                    raise SystemExit((Path(root) / "log").read_text()[-3000:])
                took = seconds()
            phases[side].append(store.read_json(Path(root) / campaign / "timings.json"))
            return took

    sets = [word for override in size.overrides for word in ("--set", override)]
    ours = ["flows.cli", "run", size.recipe, "--name", "ours", "--root", "ROOT", *sets]
    theirs = ["benchmarks.straight", size.recipe, "ROOT", *size.overrides]
    made = Comparison(
        f"campaign: {size.recipe}", "srlm run, shown by Prefect, recorded by MLflow",
        "a straight script: vllm.LLM stage after stage, stock TRL", "s", "at most", 0.8,
    )  # fmt: skip
    in_turn(lambda _: wall("ours", "ours", ours), [(made, lambda _: wall("theirs", "straight", theirs))], rounds)
    made.also = {f"phases, {side}": told for side, told in phases.items()}
    return [made]
