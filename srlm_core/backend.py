"""How a campaign's models are found, opened and trained: the one place that tells scripted models from real ones."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from srlm_core import plan
from srlm_core.config import EngineConfig, RunConfig
from srlm_core.engines import (
    cluster,
    hardware,
    machine_of,
    models,
    open_engine,
    resolve_dtype,
    resolve_kind,
    scripted,
    training_job,
)
from srlm_core.engines.protocol import Engine
from srlm_core.engines.training_job import TrainingResult
from srlm_core.errors import ConfigError
from srlm_core.methods import require_fit
from srlm_core.store import digest


class Model(NamedTuple):
    """A model of a campaign: its name, where its checkpoint lies, and what is in it."""

    name: str
    path: Path
    digest: str

    @property
    def served(self) -> bool:
        """Whether somebody else serves it: `name@http://host/v1`."""
        return "@http" in self.name


class Backend(NamedTuple):
    """What the loop asks of the world of models."""

    base: Callable[[], Model]
    """Find M0."""
    frozen: Callable[[str], Model]
    """Find another model by path, hub id, or `name@http://host/v1` for an endpoint."""
    rewards: Callable[[str], Model]
    """Find a reward model by path or hub id."""
    open: Callable[[Model], Engine]
    train: Callable[..., TrainingResult]
    digest: Callable[[Path], str]


def resolve(config: RunConfig) -> RunConfig:
    """Replace `auto` by what this machine will use, so that fingerprints hold what really made the rows.

    Raises ConfigError for settings that the method or the engine cannot work with, and for a cluster that is not there
    or is too small.
    """
    require_fit(config)
    if config.engine.placement == "ray":
        cluster.require(config.engine)
    kind = resolve_kind(config.engine)
    engine = config.engine.model_copy(update={"kind": kind})
    if kind != "scripted":
        engine = engine.model_copy(update={"dtype": resolve_dtype(engine)})
    if kind != "scripted":
        _require_gpus(config)
    return config.model_copy(update={"engine": engine})


def _require_gpus(config: RunConfig) -> None:
    """Refuse more ranks than this machine has GPUs, if it has any, and splitting models where there is none."""
    how, gpus = config.training, len(hardware.gpus())
    if how.launcher != "torchrun":
        return
    if 0 < gpus < how.ranks:
        raise ConfigError(
            f"training.ranks={how.ranks}: expected a GPU of this machine for each, got {gpus}. Set "
            f"training.ranks={gpus}, or training.launcher=ray for several machines."
        )
    if how.fsdp != "off" and not gpus:
        raise ConfigError(
            f"training.fsdp={how.fsdp}: expected GPUs to split a model over, got none. Set training.fsdp=off."
        )


def make_backend(config: RunConfig, *, cache: Path, logs: Path) -> Backend:
    """Bind the settings of a resolved config to engines, model lookup and trainers."""
    model = config.model
    if config.engine.kind == "scripted":

        def scripted_base() -> Model:
            path = scripted.base_model(cache / "scripted")
            return Model("M0", path, _scripted_digest(path))

        return Backend(
            base=scripted_base,
            frozen=lambda name: _endpoint(name) or Model(name, Path(name), _scripted_digest(Path(name))),
            rewards=lambda name: Model(name, Path(name), _scripted_digest(Path(name))),
            open=lambda asked: (
                _ask_endpoint(config, asked, logs) or open_engine(config.engine, asked.path, log=_log(logs, asked))
            ),
            train=scripted.train,
            digest=_scripted_digest,
        )

    def base() -> Model:
        path = models.resolve_model(model.path, model.revision, cache)
        return Model("M0", path, models.model_digest(path, cache))

    def frozen(name: str) -> Model:
        if (endpoint := _endpoint(name)) is not None:
            return endpoint
        return local(name, rewards=False)

    def local(name: str, *, rewards: bool) -> Model:
        path = models.resolve_model(name, None, cache, rewards=rewards)
        return Model(name, path, models.model_digest(path, cache))

    def open_model(asked: Model) -> Engine:
        if (endpoint := _ask_endpoint(config, asked, logs)) is not None:
            return endpoint
        return open_engine(
            config.engine, asked.path, log=_log(logs, asked), trust_remote_code=model.trust_remote_code,
            sampling_seconds=busy(asked.path),
        )  # fmt: skip

    def busy(path: Path) -> float:
        machine = machine_of(config.engine)
        rates = plan.of_this_machine(machine.cores, machine.gpus)
        return plan.sampling_seconds(config, models.describe(path).parameters, rates)

    rewards = partial(local, rewards=True)
    return Backend(base, frozen, rewards, open_model, training_job.train, partial(models.model_digest, cache=cache))


def _scripted_digest(path: Path) -> str:
    return digest("scripted", scripted.skill_of(path))


def describe_engine(config: EngineConfig) -> str:
    """Say in a few words which engine runs, for the log."""
    return f"{config.kind}, {config.dtype}, context {config.context}"


def _endpoint(name: str) -> Model | None:
    asked = Model(name, Path(name.split("@", 1)[0]), digest(name))
    return asked if asked.served else None


def _ask_endpoint(config: RunConfig, asked: Model, logs: Path) -> Engine | None:
    if not asked.served:
        return None
    name, url = asked.name.split("@", 1)
    engine = config.engine.model_copy(update={"kind": "openai", "base_url": url})
    return open_engine(engine, Path(name), log=_log(logs, asked))


def _log(logs: Path, asked: Model) -> Path:
    return logs / f"engine_{asked.name.replace('/', '_')}.log"
