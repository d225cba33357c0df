"""`python -m benchmarks [NAME…]`: run benchmarks, print what came of them, write it into benchmarks/results."""

import importlib
import json
import subprocess
import sys
from typing import Annotated

import typer

from benchmarks import sides
from srlm_core.engines import hardware

BENCHMARKS = {
    "similarity": "the filter on new prompts against comparing all with all",
    "loop": "the loop's own cost at 5,000 x 7 x 11 on the scripted engine, and at ten times the rows",
    "nucleus": "nucleus sampling against none, and against vLLM's own",
    "sampling": "the loop's sampling and judging against one bare vllm.LLM",
    "replicas": "two engines of one core each against one",
    "training": "SFT and DPO against TRL as it comes",
    "settings": "threads, batch and compilation of the engine: what `srlm doctor` chooses by",
    "campaign": "the whole demo against the same work as a straight script",
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"any of: {', '.join(BENCHMARKS)}; none = all")] = None,
    rounds: Annotated[int, typer.Option(help="how often each side runs")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
    keep: Annotated[bool, typer.Option(help="write the results into benchmarks/results")] = True,
) -> None:
    """Run each benchmark in a process of its own, so that none inherits another's memory or threads."""
    unknown = set(names or ()) - BENCHMARKS.keys()
    if unknown:
        raise typer.BadParameter(f"expected any of {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
    if names and len(names) == 1:
        _run(names[0], rounds, as_json=as_json, keep=keep)
        return
    flags = ["--rounds", str(rounds), *(["--json"] if as_json else []), *([] if keep else ["--no-keep"])]
    failed = [
        name
        for name in names or BENCHMARKS
        if subprocess.run([sys.executable, "-m", "benchmarks", name, *flags], check=False).returncode
    ]
    if failed:
        raise SystemExit(f"these benchmarks did not end: {', '.join(failed)}")


def _run(name: str, rounds: int, *, as_json: bool, keep: bool) -> None:
    sides.say(f"{name}: {BENCHMARKS[name]}")
    module = importlib.import_module(f"benchmarks.{name}")
    size = module.SIZES["gpu" if hardware.gpus() else "cpu"]
    made = module.compare(size, rounds)
    settings = {"rounds": rounds, **size._asdict()}
    if as_json:
        print(json.dumps({"benchmark": name, "settings": settings, "machine": sides.machine(),
                          "results": [comparison.as_dict() for comparison in made]}, indent=1))  # fmt: skip
    else:
        print("\n".join(map(str, made)))
    if keep:
        sides.say(f"written: {sides.save(name, made, settings)}")


if __name__ == "__main__":
    typer.run(main)
