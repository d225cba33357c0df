"""The loop's work as Prefect shows it: a sub-flow for each turn, a task run for each shard, nothing cached."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar
from uuid import UUID

from prefect import Flow, Task
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner

from flows import asking
from flows.bootstrap import bootstrap
from flows.evaluate import evaluate
from flows.iteration import iteration
from flows.missed import TaskRuns
from srlm_core import interrupts
from srlm_core.executor import Pending, Work
from tasks.evaluation import evaluation
from tasks.judgments import judgments
from tasks.pairs import pairs
from tasks.prompts import prompts
from tasks.responses import responses
from tasks.shard import engine_died, shard_task
from tasks.training import training

T = TypeVar("T")

FLOWS: dict[str, Flow[..., Any]] = {"bootstrap": bootstrap, "iteration": iteration, "evaluate": evaluate}
TASKS: dict[str, Task[..., Any]] = {
    "prompts": prompts, "responses": responses, "judgments": judgments,
    "pairs": pairs, "training": training, "evaluation": evaluation,
}  # fmt: skip


class Shown(NamedTuple, Generic[T]):
    """A task run under way."""

    future: PrefectFuture[T]
    after: tuple[Pending[Any], ...]
    made: list[T]
    """What the work came to, once it is there."""

    def result(self) -> T:
        """Wait for it; raises what it raised, or what something it waited for raised."""
        # Prefect calls a task run whose upstream failed "not ready"; the reason is upstream
        for earlier in self.after:
            earlier.result()
        self.future.wait()
        # asking the future for a value goes through an event loop, and every shard is asked for several times
        return self.made[-1] if self.made else self.future.result()


class PrefectExecutor:
    """Runs the loop's work inside a flow run that is under way."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.task_runs = TaskRuns()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def submit(self, work: Work[T], after: Sequence[Pending[Any]] = ()) -> Pending[T]:
        """Start a task run. The runner is first in, first out, so what a thread waits for holds a thread already."""
        interrupts.check()
        earlier = tuple(after)
        waits_for = [shown.future for shown in earlier if isinstance(shown, Shown)]
        made: list[T] = []

        def make() -> T:
            made.append(work.run())
            return made[-1]

        task, inside = task_for(work.stage), flow_run_id()
        future = task.submit(work.name, make, wait_for=waits_for)

        def note(done: PrefectFuture[T]) -> None:
            done.wait()  # else its state is what the server knows of it
            self.task_runs.note(task, work.name, inside, done.state)

        future.add_done_callback(note)
        return Shown(future, earlier, made)

    def run(self, work: Work[T]) -> T:
        interrupts.check()
        task = task_for(work.stage)
        state = task(work.name, work.run, return_state=True)
        self.task_runs.note(task, work.name, flow_run_id(), state)
        return state.result()

    def flow(self, kind: str, name: str, run: Callable[[], T]) -> T:
        """Run a turn of the loop as a sub-flow, with threads of its own."""
        return _with_threads(FLOWS[kind], self._workers)(name, run)

    def ask(self, question: str, decided: Callable[[], bool | None]) -> bool | None:
        """Pause the flow run until somebody decides."""
        return asking.ask(question, decided)


def _with_threads(flow: Flow[..., Any], workers: int) -> Flow[..., Any]:
    runner: Any = ThreadPoolTaskRunner(workers)
    return flow.with_options(task_runner=runner)


def flow_run_id() -> UUID | None:
    """Return the id of the flow run that we are in."""
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None


def task_for(stage: str) -> Task[..., Any]:
    """Return a stage's task; a stage that only one method has gets one like the others."""
    return TASKS.get(stage) or TASKS.setdefault(stage, _another(stage))


def _another(stage: str) -> Task[..., Any]:
    @shard_task(name=stage, retries=1, retry_condition_fn=engine_died)
    def make_shard(name: str, make: Callable[[], T]) -> T:
        return make()

    return make_shard
