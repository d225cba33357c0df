"""What a person sees while a campaign runs: bars on a terminal, log lines elsewhere; all of it in the log file."""

import logging
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flows.leaving import serve_command
from srlm_core import table, weights
from srlm_core.gates import Gate, in_words
from srlm_core.store import Campaign

log = logging.getLogger("srlm")


class Console:
    """An observer of the loop that writes for people."""

    def __init__(self, campaign: Campaign, *, as_json: bool) -> None:
        self._campaign, self._to_stderr = campaign, as_json
        self._terminal = Terminal(stderr=as_json, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self._terminal, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = defaultdict(int)
        self._said_at: dict[str, float] = {}
        self._told: set[str] = set()
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        attempts = len(list(self._campaign.logs.glob("attempt_*.log"))) if self._campaign.logs.exists() else 0
        self._campaign.logs.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self._campaign.logs / f"attempt_{attempts + 1:03d}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handler = handler
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        self._warnings = logging.StreamHandler(sys.stderr)
        self._warnings.setLevel(logging.WARNING)
        log.addHandler(self._warnings)
        if self._terminal.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()
        log.removeHandler(self._handler)
        log.removeHandler(self._warnings)
        self._handler.close()

    def say(self, text: str) -> None:
        """Print one line with the time since the start."""
        log.info(text)
        elapsed = int(time.monotonic() - self._started)
        self._terminal.print(f"[dim]{elapsed // 60:3d}:{elapsed % 60:02d}[/dim]  ", end="")
        self._terminal.print(text, markup=False, soft_wrap=True)

    def __call__(self, what: str, details: dict[str, Any]) -> None:
        """Take one event of the loop."""
        told = getattr(self, f"_on_{what}", None)
        if told:
            told(**details)

    def _on_phase(self, name: str) -> None:
        self.say(name)

    def _on_engine_start(self, model: str, seconds: float) -> None:
        self.say(f"engine of {model} started in {seconds:.0f} s")

    def _on_note(self, text: str) -> None:
        self.say(text)

    def _on_gate(self, t: int, gates: Sequence[Gate]) -> None:
        self.say(f"M{t}: {in_words(gates)}")

    def _on_waiting(self, question: str) -> None:
        self.say(f"{question} Decide in the Prefect UI where there is one, or by srlm approve {self._campaign.name}")

    def _on_set_aside(self, file: str, count: int, where: str) -> None:
        self.say(f"{count} rows of the {file} file are not used; each with its reason: {where}")

    def _on_shards(self, stage: str, iteration: int, total: int) -> None:
        if self._terminal.is_terminal:
            self._tasks[f"{stage} {iteration}"] = self._bars.add_task(
                f"{stage}, iteration {iteration}", total=total, rate=""
            )

    def _on_part(self, stage: str, iteration: int, shard: int, path: Path, reused: bool) -> None:
        key = f"{stage} {iteration}"
        log.info("%s part %d of iteration %d %s: %s", stage, shard, iteration, "reused" if reused else "made", path)
        if key in self._tasks:
            self._bars.advance(self._tasks[key])
        elif not self._terminal.is_terminal and stage != "evaluation" and not reused:
            self.say(f"iteration {iteration}: {stage}, shard {shard + 1}")

    def _on_training(self, model: str, progress: dict[str, Any]) -> None:
        event = progress.get("event")
        if event == "rows":
            dropped = progress.get("n_dropped", 0)
            self.say(f"{model}: {progress['n_rows']} rows" + (f", {dropped} left out as too long" if dropped else ""))
        elif event == "resumed":
            self.say(f"{model}: going on from the checkpoint of step {progress['step']}")
        elif event == "step":
            self._on_step(model, progress)

    def _on_step(self, model: str, progress: dict[str, Any]) -> None:
        step, total, loss = progress["step"], progress["total_steps"], progress.get("loss")
        told = f"loss {loss:.3f}" if loss is not None else ""
        if self._terminal.is_terminal:
            if model not in self._tasks:
                self._tasks[model] = self._bars.add_task(f"training {model}", total=total, rate="")
            self._bars.update(self._tasks[model], completed=step, rate=told)
        elif step == total or time.monotonic() - self._said_at.get(model, 0) > 20:
            self._said_at[model] = time.monotonic()
            left = (total - step) * progress.get("s_per_step", 0)
            self.say(f"{model}: step {step}/{total}, {told}, {left:.0f} s left")

    def _on_model(self, model: Any, result: Any, kind: str) -> None:
        self.say(
            f"{model.name} is trained: {kind} on {result.n_rows} rows, {result.steps} steps, {result.seconds:.0f} s"
        )

    def _on_evaluation(self, model: str, results: dict[str, Any]) -> None:
        if "judge" in results and model not in self._told:  # what an annotator adds later changes nothing of it
            self._told.add(model)
            accuracy = results["judge"]["pairwise_accuracy"]
            if accuracy["value"] is not None:
                longer = results["judge"]["longer_accuracy"]
                self.say(
                    f"{model} as judge: {accuracy['value']:.3f} ± {accuracy['stderr']:.3f} of {accuracy['n']} "
                    f"ranked pairs right (always the longer: {longer['value']:.3f})"
                )

    def farewell(self, rows: Sequence[dict[str, Any]], page: Path, root: Path) -> None:
        """Say where everything is, and how to go on."""
        from srlm_core import store

        timings: dict[str, float] = store.read_json(self._campaign.folder / "timings.json") or {}
        self._terminal.print(table.as_text(rows), markup=False)
        self._terminal.print("where the minutes went:")
        for name, seconds in timings.items():
            inside = " (within the others)" if name == "engine starts" else ""
            self._terminal.print(f"  {name:<40}{seconds / 60:6.1f} min{inside}", markup=False)
        mine = [row["model"] for row in rows if re.fullmatch(r"M[1-9]\d*", row["model"])]
        last = [model for model in mine if (self._campaign.model(model) / weights.MARKER).is_file()][-1:]
        folder, database = self._campaign.folder, root / "mlflow.db"
        tracked = (folder / "mlflow.json").is_file() and database.is_file()
        lines = [
            f"report    {page}" if page.is_file() else f"report    not written: srlm report {self._campaign.name}",
            f"datasets  {folder}/iter_*/  (Parquet)",
            *([f"MLflow    mlflow ui --backend-store-uri sqlite:///{database}"] if tracked else []),
            *(f"talk      srlm chat {self._campaign.model(model)}" for model in last),
            *(f"serve     {command}" for model in last if (command := serve_command(self._campaign.model(model)))),
            *(f"take      srlm export {self._campaign.name} --datasets{_rooted(root)}" for _ in last),
        ]
        self._terminal.print("\n".join(lines), markup=False, soft_wrap=True)


def _rooted(root: Path) -> str:
    return "" if root == Path("runs").resolve() else f" --root {root}"
