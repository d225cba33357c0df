"""What the ranks of one training tell one another. All of them call these at the same place; one alone says nothing."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from srlm_core.engines.child import MEETING

T = TypeVar("T")


def meet(n: int) -> None:
    """Join the others, who were started with RANK and WORLD_SIZE in their environment; on CPU they speak by gloo."""
    if n > 1:
        file = os.environ.get(MEETING)
        at = {"init_method": f"file://{file}", "rank": int(os.environ["RANK"]), "world_size": n} if file else {}
        PartialState(cpu=not torch.cuda.is_available(), **at)


def first() -> bool:
    """Whether this rank speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def here() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def from_first(n: int, find: Callable[[], T]) -> T:
    """Have the first rank find something, and give it to every rank; what it raises, every rank raises."""
    if n == 1:
        return find()
    found: list[Any] = [None, None]
    if first():
        try:
            found[0] = find()
        except Exception as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def from_all(n: int, mine: T) -> list[T]:
    """Give every rank what each of them has, in their order."""
    return [mine] if n == 1 else gather_object([mine])


def leave(n: int) -> None:
    """Wait for the others, and part."""
    if n > 1:
        PartialState().wait_for_everyone()
