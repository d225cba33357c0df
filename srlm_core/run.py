"""run: a campaign while it runs: its settings, folder, models and engines, its clock, and who watches."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

from srlm_core import store, weights
from srlm_core.backend import Backend, Model
from srlm_core.config import RunConfig
from srlm_core.engines.on_demand import OnDemand, Usage
from srlm_core.engines.protocol import Engine
from srlm_core.engines.training_job import TrainingResult
from srlm_core.executor import Executor
from srlm_core.methods import METHODS
from srlm_core.mirror import Mirror
from srlm_core.seed_data import SeedData, load_seed
from srlm_core.store import Campaign
from srlm_core.weights import MARKER

BASE, BASELINE = "M0", "sft_baseline"


Observer = Callable[[str, dict[str, Any]], None]
"""Told (what happened, details): part, training, model, gate, iteration, evaluation, engine_start, phase, waiting,
stopped, finished."""


@dataclass
class Run:
    """One campaign being run."""

    config: RunConfig
    campaign: Campaign
    executor: Executor
    backend: Backend
    observers: Sequence[Observer] = ()
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        self.timings: dict[str, float] = store.read_json(self.campaign.folder / "timings.json") or {}
        self.measured: dict[str, None] = {}
        """The models that this run measured or found measured, in order."""
        self.reward_is_measured = False
        """Whether this run measured the reward model: it answers nothing, so it is none of `measured`."""
        self.usage: dict[str, dict[str, Any]] = store.read_json(self.campaign.folder / "usage.json") or {}
        self._counting = Lock()  # engines start in the threads of their shards, while the loop times its phases

    def tell(self, what: str, **details: Any) -> None:
        """Tell the observers."""
        for observer in self.observers:
            observer(what, details)

    @cached_property
    def base(self) -> Model:
        return self.backend.base()

    @cached_property
    def seed_data(self) -> SeedData:
        return load_seed(self.config, teaches_judging=METHODS[self.config.method].teaches(self.config))

    def model(self, name: str) -> Model:
        """Return a finished model of this campaign, or another one by path."""
        if name == BASE:
            return self.base
        folder = self.campaign.model(name)
        marker = store.read_json(folder / MARKER)
        if marker is None:
            return self.backend.frozen(name)
        return Model(name, folder, marker["digest"])

    def role(self, name: str, policy: Model) -> Model:
        """Return the model that plays a role: the policy, the base, or another one by path."""
        return {"policy": policy, "base": self.base}.get(name) or self.model(name)

    def reward_model(self, name: str) -> Model:
        """Return a reward model that the user names: in the campaign it goes by its role, like one that was trained."""
        return self.backend.rewards(name)._replace(name="reward")

    @contextmanager
    def engines(self) -> Iterator[Callable[[Model], OnDemand]]:
        """Lend engines: one for each model, started when first asked, closed together."""
        open_ones: dict[str, OnDemand] = {}
        with ExitStack() as stack:

            def lend(model: Model) -> OnDemand:
                if model.name not in open_ones:
                    engine = OnDemand(model.name, partial(self._open, model), self._engine_started)
                    open_ones[model.name] = stack.enter_context(engine)
                return open_ones[model.name]

            yield lend
        self._count(open_ones.values())

    def _open(self, model: Model) -> Engine:
        return self.backend.open(self.with_weights(model))

    def with_weights(self, model: Model) -> Model:
        """Return a model that is about to be loaded, fetched from the mirror where its weights were dropped here.

        Raises ModelError where they are nowhere, saying how to get them back.
        """
        if (
            weights.are_dropped(model.path)
            and self.mirror is not None
            and model.path.is_relative_to(self.campaign.folder)
        ):
            self.tell(
                "note", text=f"{model.name}: its weights were dropped here, and are fetched from {self.mirror.url}"
            )
            self.mirror.fetch_folder(model.path)
            if weights.files(model.path) and self.backend.digest(model.path) == model.digest:
                weights.take_back(model.path)
        weights.require(model.path)
        return model

    def has(self, model: Model) -> bool:
        """Whether a model's folder holds what its digest says, or did until its weights were dropped."""
        return weights.are_dropped(model.path) or self.backend.digest(model.path) == model.digest

    @property
    def fetch(self) -> Callable[[Path, Path], bool] | None:
        """Brings a part and its drops from the mirror, if there is one."""
        return self.mirror.fetch if self.mirror else None

    def _engine_started(self, model: str, seconds: float) -> None:
        self.add_time("engine starts", seconds)
        with (self.campaign.logs / "engine_starts.txt").open("a") as file:
            file.write(f"{model}\n")
        self.tell("engine_start", model=model, seconds=seconds)

    def _count(self, engines: Iterable[OnDemand]) -> None:
        with self._counting:
            for engine in engines:
                for stage, used in engine.usage.items():
                    total = Usage(**self.usage.get(stage, {}))
                    self.usage[stage] = {
                        "requests": total.requests + used.requests,
                        "tokens": total.tokens + used.tokens,
                        "seconds": round(total.seconds + used.seconds, 2),
                    }
            store.write_json(self.campaign.folder / "usage.json", self.usage)

    def sampled(self, model: str, result: TrainingResult) -> None:
        """Count what a training sampled by itself."""
        if result.generated_tokens:
            used = Usage(result.n_rows, result.generated_tokens, round(result.seconds, 2))
            with self._counting:
                self.usage[f"training {model}"] = asdict(used)
                store.write_json(self.campaign.folder / "usage.json", self.usage)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; the sum over attempts goes into timings.json."""
        started = time.monotonic()
        self.tell("phase", name=name)
        try:
            yield
        finally:
            self.add_time(name, time.monotonic() - started)

    def add_time(self, name: str, seconds: float) -> None:
        with self._counting:
            self.timings[name] = round(self.timings.get(name, 0.0) + seconds, 2)
            store.write_json(self.campaign.folder / "timings.json", self.timings)
