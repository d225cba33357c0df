"""`python -m benchmarks [NAME…]`: run benchmarks, print what came of them, write it into benchmarks/results."""

import importlib
import json
import subprocess
import sys
from typing import Annotated

import typer

from benchmarks import sides
from srlm_core import store
from srlm_core.engines import hardware

BENCHMARKS = {
    "similarity": "the filter on new prompts against comparing all with all",
    "loop": "the loop's own cost at 5,000 x 7 x 11 on the scripted engine, and at ten times the rows",
    "meta": "Meta-Rewarding's own cost at 550,000 comparisons of judgments, on the scripted engine",
    "logprobs": "log-probabilities of responses, for CREAM, against a bare batched forward",
    "nucleus": "nucleus sampling against none, and against vLLM's own",
    "sampling": "the loop's sampling and judging against one bare vllm.LLM",
    "evaluation": "a whole evaluation of one model against one bare vllm.LLM",
    "replicas": "two engines of one core each against one",
    "placement": "two replicas as Ray actors against two child processes",
    "training": "SFT and DPO against TRL as it comes",
    "losses": "a step of each loss of a pair against one of plain DPO",
    "settings": "threads, batch and compilation of the engine: what `srlm doctor` chooses by",
    "campaign": "the whole demo against the same work as a straight script",
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"any of: {', '.join(BENCHMARKS)}; none = all")] = None,
    rounds: Annotated[int, typer.Option(help="how often each side runs")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
    keep: Annotated[bool, typer.Option(help="write the results into benchmarks/results")] = True,
    more: Annotated[bool, typer.Option("--more", help="add these rounds to those that are kept")] = False,
) -> None:
    """Run each benchmark in a process of its own, so that none inherits another's memory or threads."""
    unknown = set(names or ()) - BENCHMARKS.keys()
    if unknown:
        raise typer.BadParameter(f"expected any of {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
    if names and len(names) == 1:
        _run(names[0], rounds, as_json=as_json, keep=keep, more=more)
        return
    flags = ["--rounds", str(rounds), *(["--json"] * as_json), *(["--more"] * more), *(["--no-keep"] * (not keep))]
    failed = [
        name
        for name in names or BENCHMARKS
        if subprocess.run([sys.executable, "-m", "benchmarks", name, *flags], check=False).returncode
    ]
    if failed:
        raise SystemExit(f"these benchmarks did not end: {', '.join(failed)}")


def _run(name: str, rounds: int, *, as_json: bool, keep: bool, more: bool) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    size = module.SIZES["gpu" if hardware.gpus() else "cpu"]
    told = {"benchmark": name, "settings": json.loads(json.dumps(size._asdict())), "machine": sides.machine()}
    kept = sides.results(name)
    earlier = store.read_json(kept) if more and kept.exists() else None
    if earlier:
        sides.require_alike(earlier, told["settings"])
        told["machine"]["commit"] = f"{earlier['machine']['commit']}, {told['machine']['commit']}"
    sides.say(f"{name}: {BENCHMARKS[name]}")
    made: list[sides.Comparison] = module.compare(size, rounds)
    if earlier:
        sides.add_rounds(earlier["results"], made)
    told["results"] = [comparison.as_dict() for comparison in made]
    print(json.dumps(told, indent=1) if as_json else "\n".join(map(str, made)))
    if keep:
        kept.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(kept, told)
        sides.say(f"written: {kept}")


if __name__ == "__main__":
    typer.run(main)
