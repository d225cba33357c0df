"""What a method is made of: steps, each of which turns the tables of one shard into one new table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Engine
from srlm_core.prompts import Kept
from srlm_core.seed_data import SeedData


class Given(NamedTuple):
    """What an iteration begins with, before it is cut into shards."""

    wanted: int
    """Prompts that it is to hold."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Rows of the user's data that are used in it, at most `wanted`; what is missing the model writes."""
    note: str = ""
    """What the user should know of it."""


@dataclass(frozen=True)
class Shard:
    """What a step is handed: one slice of an iteration."""

    config: RunConfig
    iteration: int
    number: int
    wanted: int
    """Prompts this shard is to hold."""
    given: tuple[Mapping[str, Any], ...]
    """The rows of the user's data among them; see the method's `given`."""
    policy: str
    """Name of M_t."""
    models: Mapping[str, str]
    """Role to model name: generator, policy, judge."""
    engine: Engine
    """The engine of the step's role."""
    kept: Kept
    inputs: Mapping[str, pa.Table] = field(default_factory=dict)
    """The datasets the step reads, and `drops:<dataset>` beside each."""
    present: pa.Table | None = None
    """Rows that exist already and are to be completed, not made again."""


@dataclass(frozen=True)
class Step:
    """A function that makes one dataset of an iteration, shard by shard."""

    makes: str
    reads: tuple[str, ...]
    role: str | None
    """Which model it runs: generator, policy, judge; null for pure table work."""
    version: int
    """Raised when the meaning of the rows changes: a fingerprint cannot see code."""
    settings: tuple[str, ...]
    """Settings that change its rows (dotted); engine settings come with the role."""
    run: Callable[[Shard], tuple[pa.Table, pa.Table]]
    in_order: bool = False
    """Shards depend on the ones before: made one after the other."""
    takes_given: bool = False
    """Reads the shard's `given` rows."""
    texts: Callable[[RunConfig], list[str]] = lambda config: []
    """Identities of text files that its rows depend on, such as a rubric."""
    passes: Callable[[RunConfig], int] = lambda config: 1
    """How many passes a complete shard holds; more can be added to what is there."""


@dataclass(frozen=True)
class Method:
    """A paper's algorithm."""

    name: str
    title: str
    source: str
    steps: tuple[Step, ...]
    given: Callable[[RunConfig, SeedData, int], Given]
    """What iteration t begins with."""
    teaches_judging: bool = True
    """M1 is taught IFT and EFT; where False, IFT alone, and so it is sft_baseline."""
    refuses: Callable[[RunConfig], str | None] = lambda config: None
    """Say which settings it cannot work with, what it expected and what to do."""

    @property
    def trains_on(self) -> str:
        """The dataset that the last step makes: what M_{t+1} is trained on."""
        return self.steps[-1].makes
