"""capability: what a model can do besides chatting: ARC, HellaSwag, GSM8K, MMLU, … (section 3.2, table 3).

Tasks, prompts and metrics are lm-evaluation-harness's own; the model is the engine that is open. Datasets come from the
hub, or from local copies that a task of the user's own names (`evaluation.suites.capability_tasks`).
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import schemas
from srlm_core.config import SuitesConfig
from srlm_core.engines.protocol import Engine, Request, Sampling, ScoredText
from srlm_core.errors import ConfigError, DataError
from srlm_core.rates import rate

VERSION = 1
SCORES = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("doc", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
    ]
)
"""One metric of one question; null where a request to the model did not fit its context."""
_ONE_AT_A_TIME = threading.Lock()
"""The harness sets random seeds of the whole process while it builds its prompts."""


class Panel(NamedTuple):
    """How a task is asked."""

    shots: int | None
    """Examples shown; null = as the task says."""
    questions: int | None
    own_tasks: str | None
    """Folder of the user's task files, in the harness's own form."""

    @classmethod
    def of(cls, config: SuitesConfig) -> "Panel":
        """Read it from the settings."""
        return cls(config.capability_shots, config.questions, config.capability_tasks)


def take(task: str, engine: Engine, panel: Panel) -> tuple[pa.Table, pa.Table]:
    """Let an engine take one task; rows SCORES, and DROPS for what did not fit.

    Raises ConfigError where lm-eval is not installed or knows no such task, DataError where its data cannot be had.
    """
    asker = _asker(engine)
    with _ONE_AT_A_TIME:
        samples = _run(task, asker, panel)
    rows: list[dict[str, object]] = []
    for name, docs in samples.items():
        for doc in docs:
            missing = any(asker.failed(arguments) for arguments in doc["arguments"])
            for metric in doc["metrics"]:
                if isinstance(doc[metric], bool | int | float):
                    label = metric if doc["filter"] == "none" else f"{metric}_{doc['filter'].replace('-', '_')}"
                    value = None if missing else float(doc[metric])
                    rows.append({"task": name, "doc": str(doc["doc_id"]), "metric": label, "value": value})
    drops = [
        {"id": f"{task} {number}", "stage": "evaluation", "reason": "prompt_too_long", "iteration": 0, "detail": text}
        for number, text in enumerate(asker.too_long)
    ]
    return schemas.table(rows, SCORES), schemas.table(drops, schemas.DROPS)


def measure(task: str, rows: pa.Table) -> dict[str, Any]:
    """Return the mean of each metric over the questions of a task, or of all tasks of a group."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows.to_pylist():
        values[row["metric"]].extend([] if row["value"] is None else [row["value"]])
    return {f"{task}_{metric}": rate(found)._asdict() for metric, found in sorted(values.items())}


def _run(task: str, asker: Any, panel: Panel) -> dict[str, list[dict[str, Any]]]:
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _tasks(panel.own_tasks)
    if not manager.match_tasks([task]):
        raise ConfigError(
            f"evaluation.suites.capability: expected tasks of lm-evaluation-harness, got {task!r}. "
            "`lm-eval ls tasks` lists them; your own go into evaluation.suites.capability_tasks."
        )
    try:
        found = simple_evaluate(
            asker, tasks=[task], num_fewshot=panel.shots, limit=panel.questions, task_manager=manager, bootstrap_iters=0
        )
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(
            f"evaluation.suites.capability: expected the data of {task!r}, got: {error}. Without the hub, name a local "
            "copy in a task file of your own (evaluation.suites.capability_tasks)."
        ) from error
    told: Any = found  # typed by the harness as if there were none
    return told["samples"]


@lru_cache(maxsize=1)
def _tasks(own: str | None) -> Any:
    """List the harness's tasks and the user's own; reading thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=own)


def _asker(engine: Engine) -> Any:
    """Make the harness's view of an engine: texts in, log-probabilities and texts out."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError(
            f"evaluation.suites.capability: expected lm-eval, got: {error}. pip install 'srlm[suites]'."
        ) from error

    class Asker(LM):
        def __init__(self) -> None:
            super().__init__()
            self._failed: set[tuple[str, str]] = set()
            self.too_long: list[str] = []

        def failed(self, arguments: Sequence[Any]) -> bool:
            return (arguments[0], str(arguments[1])) in self._failed

        def _fail(self, arguments: Sequence[Any]) -> None:
            self._failed.add((arguments[0], str(arguments[1])))
            self.too_long.append(arguments[0][-200:])

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            texts = (ScoredText(str(n), (), asked.args[1], asked.args[0]) for n, asked in enumerate(requests))
            weighed = {int(found.id): found for found in engine.logprobs(texts)}
            for number, found in weighed.items():
                if found.logprob is None:
                    self._fail(requests[number].args)
            in_order = (weighed[number] for number in range(len(requests)))
            # what does not fit is marked, and left out of every mean
            return [(0.0 if one.logprob is None else one.logprob, one.greedy) for one in in_order]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked = (
                Request(str(n), prefix=one.args[0], sampling=_sampling(one.args[1])) for n, one in enumerate(requests)
            )
            said = {int(done.request_id): done for done in engine.generate(asked)}
            for number, done in said.items():
                if done.finish_reason == "too_long":
                    self._fail(requests[number].args)
            return [said[number].text for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise ConfigError(
                "evaluation.suites.capability: expected tasks with right answers, got one that measures perplexity. "
                "Leave it out."
            )

    return Asker()


def _sampling(asked: dict[str, Any]) -> Sampling:
    stop = asked.get("until") or ()
    return Sampling(
        temperature=float(asked.get("temperature") or 0) if asked.get("do_sample") else 0.0,
        top_p=float(asked.get("top_p") or 1),
        max_tokens=int(asked.get("max_gen_toks") or 256),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def identity(panel: Panel) -> list[Any]:
    """Say what the scores are made from, the user's task files included."""
    own = sorted(Path(panel.own_tasks).expanduser().rglob("*.yaml")) if panel.own_tasks else []
    return [VERSION, panel.shots, panel.questions, [path.read_text(encoding="utf-8") for path in own]]
