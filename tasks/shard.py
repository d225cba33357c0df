"""What the tasks of all stages share: a name that says which shard it is, no cache, no stored results.

The files are the truth, so Prefect remembers nothing that could disagree with them: a task passes paths and stamps.
"""

from functools import partial
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from srlm_core.errors import EngineDied

shard_task = partial(task, task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
"""Decorate a stage's function (name, make). No tags: they would cost every run a call to the server."""


def engine_died(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Say whether to try again: an engine that died is started anew, a wrong setting or bad data stays wrong."""
    return isinstance(state.data, EngineDied)
