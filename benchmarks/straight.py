"""The whole campaign as a straight script: one `vllm.LLM` for each model, stage after stage, and TRL as it comes.

It calls the project's own stages, so that the work is the same: the same prompts, requests, judgments and pairs. What
differs is what is measured: nothing overlaps, one list of requests at a time, training by the stock trainers.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from benchmarks.bare import Bare
from benchmarks.workload import filled
from srlm_core import loop, store
from srlm_core.backend import Model, make_backend, resolve
from srlm_core.engines.training_job import TrainingJob, TrainingResult
from srlm_core.executor import Pending, Work
from srlm_core.recipes import load
from srlm_core.run import Run
from srlm_core.store import Campaign

T = TypeVar("T")


class Done(NamedTuple):
    value: Any

    def result(self) -> Any:
        return self.value


class OneByOne:
    """Does each piece of work when it is submitted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def submit(self, work: Work[T], after: Sequence[Pending[Any]] = ()) -> Pending[T]:
        return Done(work.run())

    def run(self, work: Work[T]) -> T:
        return work.run()

    def flow(self, kind: str, name: str, run: Callable[[], T]) -> T:
        return run()

    def ask(self, question: str, decided: Callable[[], bool | None]) -> bool | None:
        return decided()


def main() -> None:
    """Run the recipe named on the command line, in the folder named there."""
    recipe, root, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    config = resolve(load(recipe, None, overrides))
    whole = filled(config.engine.model_copy(update={"shard_rows": max(1, config.prompts.target)}))
    config = config.model_copy(update={"engine": whole})
    with Campaign(root, "straight") as campaign, OneByOne() as executor:
        campaign.logs.mkdir(exist_ok=True)
        backend = make_backend(config, cache=root / ".cache" / "models", logs=campaign.logs)

        def open_bare(model: Model) -> Bare:
            return Bare(config.engine, model.path)

        loop.self_reward(Run(config, campaign, executor, backend._replace(open=open_bare, train=train)))


def train(job: TrainingJob, *, log: Path, on_progress: Any = None) -> TrainingResult:
    """Train with the stock script."""
    asked = job.work_dir / "job.json"
    asked.write_text(job.model_dump_json())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    with log.open("w") as file:
        command = [sys.executable, "-m", "benchmarks.stock", str(asked)]
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=True)
    took = store.read_json(job.output / "took.json")
    history = tuple({"step": step, "loss": loss} for step, loss in enumerate(took["losses"], start=1))
    return TrainingResult(
        log=history, steps=len(history), epochs=job.settings.epochs, n_rows=store.read_part(job.rows).num_rows,
        n_heldout=0, dropped=(), seconds=took["seconds"], resumed_from_step=None, memory_mib=0.0, gpu_memory_mib=None,
        best_step=len(history), precision="float32",
    )  # fmt: skip


if __name__ == "__main__":
    main()
