"""What a flow run says of its end: what the campaign came to, or why it was stopped on purpose, which is no crash."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from srlm_core import gates, summary
from srlm_core.errors import CancelledByPerson, Stopped

T = TypeVar("T")


def told(run: Callable[[], T]) -> T | State[Any]:
    """Run something; an end on purpose becomes a state with a name of its own. Whoever called is still raised to."""
    try:
        return run()
    except Stopped as why:
        end = Cancelled if isinstance(why, CancelledByPerson) else Failed
        return end(name=why.title, message=str(why), data=why)


def completed(folder: Path) -> State[Any]:
    """Say in a completed state what a campaign came to."""
    made = [model for model in summary.models(folder) if model.startswith("M")]
    n = len(summary.iterations(folder))
    asked = [gate for of_model in gates.read(folder).values() for gate in of_model]
    held = f"; {gates.in_words(asked)}" if asked else ""
    return Completed(message=f"{made[-1]} after {n} iteration{'' if n == 1 else 's'}{held}")
