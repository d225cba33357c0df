"""What a method is made of: steps, each of which turns the tables of one shard into one new table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Engine
from srlm_core.prompts import Kept
from srlm_core.rates import Rate
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
    """Role to model name; see Step.role."""
    engine: Engine
    """The engine of the step's role."""
    kept: Kept
    inputs: Mapping[str, pa.Table] = field(default_factory=dict)
    """The datasets the step reads, and `drops:<dataset>` beside each."""
    whole: Mapping[str, Iterable[pa.Table]] = field(default_factory=dict)
    """Instead, for a step that gathers: each dataset of the iteration, a shard at a time, as often as asked."""
    present: pa.Table | None = None
    """Rows that exist already and are to be completed, not made again."""


class Asked(NamedTuple):
    """What a step asks of its model for one prompt, at most; what a campaign will cost is reckoned from it."""

    requests: float = 0.0
    """Completions, or texts that are scored."""
    writes: int = 0
    """Longest completion, tokens; 0 where probabilities alone are read."""
    reads: float = 0.0
    """Texts as long as a response that are read for all of them together, each prefix once."""


@dataclass(frozen=True)
class Step:
    """A function that makes one dataset of an iteration, shard by shard."""

    makes: str
    reads: tuple[str, ...]
    role: str | None
    """Which model it runs: generator, policy (M_t), judge, previous (M_{t-1}), sft (M1), base (M0), or the role of a
    Training before it; null for pure table work."""
    version: int
    """Raised when the meaning of the rows changes: a fingerprint cannot see code."""
    settings: tuple[str, ...]
    """Settings that change its rows (dotted); engine settings come with the role."""
    run: Callable[[Shard], tuple[pa.Table, pa.Table]]
    in_order: bool = False
    """Shards depend on the ones before: made one after the other."""
    gathers: bool = False
    """Waits for all shards of what it reads and makes one part of them, which every shard of a later step is handed."""
    takes_given: bool = False
    """Reads the shard's `given` rows."""
    texts: Callable[[RunConfig], list[str]] = lambda config: []
    """Identities of text files that its rows depend on, such as a rubric."""
    passes: Callable[[RunConfig], int] = lambda config: 1
    """How many passes a complete shard holds; more can be added to what is there."""
    asks: Callable[[RunConfig, int], Asked] = lambda config, t: Asked()
    """What it asks for one prompt of iteration t, by the settings of that iteration."""


@dataclass(frozen=True)
class Training:
    """A model that is trained between the steps; those after it may ask it by its role."""

    role: str
    kind: Literal["sft", "dpo", "reward"]
    reads: tuple[str, ...]
    """The datasets that it learns from, all shards of each."""
    rows: Callable[[RunConfig, SeedData, Mapping[str, Iterable[pa.Table]]], Iterable[pa.Table]]
    """Lays out what the trainer reads: rows EXAMPLES or PREFERENCES, a piece at a time."""
    init_from: str = "policy"
    """Role of the model whose weights it begins with."""
    reference: str | None = None
    """Role of the frozen model in the loss; null = the one it begins with."""
    once: bool = False
    """The same for all iterations, as long as its rows are."""
    named: Callable[[RunConfig], str | None] = lambda config: None
    """Another model that the user names to play the role; then nothing is trained."""

    def name(self, t: int) -> str:
        """Name the model: `M2_future` in iteration 2; one that is trained once is named by its role alone."""
        return self.role if self.once else f"M{t}_{self.role}"


class Measure(NamedTuple):
    """A number that only this method has."""

    label: str
    """The words before its line in the report."""
    rate: Rate


@dataclass(frozen=True)
class Method:
    """A paper's algorithm."""

    name: str
    title: str
    source: str
    steps: tuple[Step | Training, ...]
    """The last one makes what M_{t+1} is trained on."""
    given: Callable[[RunConfig, SeedData, int], Given]
    """What iteration t begins with."""
    teaches_judging: bool = True
    """M1 is taught IFT and EFT, to score responses; where False, IFT alone, and so it is sft_baseline."""
    compares: Callable[[RunConfig], bool] = lambda config: False
    """Whether its judge, which its policy is or may be, says which of two responses is better, asked as by
    comparisons.as_asked: what `seed_data.eft_targets = self_taught` teaches."""
    learns: Literal["dpo", "online"] = "dpo"
    """How M_{t+1} is trained: by DPO on `pairs`, or by a policy gradient on `prompts`, which the model of the role
    `reward` rewards."""
    starts_from: str | None = None
    """Role of the Training whose model `previous` means as init_from and reference; null = M_t."""
    labels: bool = True
    """Its pairs say which response is better; where False, `training.dpo.loss` must be one that finds it out."""
    refuses: Callable[[RunConfig], str | None] = lambda config: None
    """Say which settings it cannot work with, what it expected and what to do."""
    scores_win_rates: Callable[[RunConfig], bool] = lambda config: False
    """Whether the scores of its pairs are win rates, 0 to 1: what the loss `sppo` reads."""
    training_asks: Callable[[RunConfig, int], Asked] = lambda config, t: Asked()
    """What the training of M_{t+1} samples by itself for one prompt of iteration t."""
    pairs_of_a_prompt: Callable[[RunConfig], float] = lambda config: 1.0
    """Pairs that a prompt gives where it gives any, at most."""
    measures: Callable[[Mapping[str, Iterable[pa.Table]], RunConfig], Mapping[str, Measure]] = lambda made, config: {}
    """What it measures of an iteration's datasets, each handed a shard at a time, beside what is measured for all."""

    def teaches(self, config: RunConfig) -> bool:
        """Whether M1 is taught to judge: to score responses or, by `self_taught`, to compare them."""
        return self.compares(config) if config.seed_data.eft_targets == "self_taught" else self.teaches_judging

    def start(self, t: int) -> str:
        """Name the model that M_{t+1} goes on from."""
        return next((taught.name(t) for taught in self.trainings if taught.role == self.starts_from), f"M{t}")

    @property
    def trainings(self) -> tuple[Training, ...]:
        """The models that are trained between the steps."""
        return tuple(step for step in self.steps if isinstance(step, Training))

    @property
    def makes(self) -> tuple[Step, ...]:
        """The steps that make datasets."""
        return tuple(step for step in self.steps if isinstance(step, Step))
