"""MLflow watches a campaign: one parent run, one child run per training, every M_t as a logged model.

The files stay the truth: what is logged is read from the campaign folder, so whatever was missed (MLflow was down, the
process was killed) is logged by the same command again, and nothing is logged twice. Step t belongs to M_t.
This is the only module that imports mlflow, and only inside functions: the import takes seconds.
"""

import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import gates, settings, store, summary, weights
from srlm_core.config import RunConfig
from srlm_core.errors import ConfigError, ModelError
from srlm_core.store import Campaign
from tasks.background import AtMost, Background
from tasks.registry import Registry

log = logging.getLogger("srlm")

FLUSH_S = 120.0
"""Longest wait at the end of a campaign for what is still to be logged."""
HURRY_S = 10.0
"""The same after Ctrl-C."""
REACH_S = 10.0
"""Longest wait at the start for a server."""
LIVE_S = 2.0
"""Seconds between two writes of a curve while it grows."""
BATCH = 500
PARAMS = (
    "recipe", "size", "method", "seed", "model.path", "responses.n", "judgments.k", "judgments.reading",
    "training.sft.learning_rate", "training.dpo.learning_rate", "training.dpo.beta",
)  # fmt: skip
DATASETS = ("prompts", "responses", "judgments", "pairs")
SAMPLES = "pairs.json"
"""Table of the first pairs."""
CHECKPOINT = "checkpoint"
"""Folder of a logged model that holds the checkpoint."""


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    step: int


class Tracking:
    """An observer of the loop that keeps MLflow's record of one campaign, from a thread of its own."""

    def __init__(self, config: RunConfig, campaign: Campaign) -> None:
        self.uri = tracking_uri(config, campaign.root)
        self._behind = Background(
            "MLflow", "The campaign goes on; what it misses now, it is told later, or by the same command again.", _away
        )
        self._record = Record(self.uri, config, campaign)
        self._curves: dict[str, list[Point]] = {}
        self._live = AtMost(LIVE_S)
        self._begun = threading.Event()

    def __enter__(self) -> Self:
        """Begin; raises ConfigError where there is nobody at the address of a tracking server."""
        _require(self.uri)
        # the import and a first database take ten seconds: begun now, beside the loop
        self._behind.put(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        if not interrupted:
            self._behind.put(self._record.everything)
        self._behind.put(self._record.end, "KILLED" if interrupted else "FINISHED" if kind is None else "FAILED")
        self._behind.close(HURRY_S if interrupted else FLUSH_S)

    def __call__(self, what: str, details: dict[str, Any]) -> None:
        """Take one event of the loop."""
        told = getattr(self, f"_on_{what}", None)
        if told:
            told(**details)

    def note(self, **tags: str) -> None:
        """Tag the campaign's run."""
        self._behind.put(self._record.tag, tags)

    def where(self, timeout_s: float = 60.0) -> str | None:
        """Say how to see the campaign's run, once that is known: its address, or the command that shows it."""
        return self._record.where() if self._begun.wait(timeout_s) and not self._behind.failing else None

    def _begin(self) -> None:
        try:
            self._record.begin()
        finally:
            self._begun.set()

    def _on_training(self, model: str, progress: Mapping[str, Any]) -> None:
        if progress.get("event") != "step":
            return
        self._curves.setdefault(model, []).extend(_points([progress]))
        if self._live.now():
            self._behind.put(self._record.grow, model, self._curves.pop(model))

    def _on_model(self, model: Any, **_: Any) -> None:
        self._curves.pop(model.name, None)
        self._behind.put(self._record.trained, model.name)

    def _on_evaluation(self, model: str, **_: Any) -> None:
        self._behind.put(self._record.evaluated, model)

    def _on_gate(self, t: int, **_: Any) -> None:
        self._behind.put(self._record.held, t)

    def _on_iteration(self, t: int) -> None:
        self._behind.put(self._record.iteration, t)
        # as it is now: it may be a while until MLflow is told
        self._behind.put(self._record.spent, t, self._record.usage())


def tracking_uri(config: RunConfig, root: Path) -> str:
    """Return the tracking server: the setting, the environment, or SQLite beside the campaigns."""
    beside = f"sqlite:///{root.resolve() / 'mlflow.db'}"
    return config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or beside


def _require(uri: str) -> None:
    """Raise ConfigError where nothing answers: a wrong address is better told now than after ten hours."""
    if not uri.startswith("http"):
        return
    try:
        urllib.request.urlopen(uri, timeout=REACH_S).close()
    except urllib.error.HTTPError:
        pass  # it asks who we are, or has no such page: somebody is there
    except OSError as error:
        raise ConfigError(
            f"expected an MLflow server at {uri}, as MLFLOW_TRACKING_URI or tracking.mlflow_uri says, got: "
            f"{getattr(error, 'reason', error)}. Start it, name another one, or go on without it: --no-mlflow"
        ) from None


def _away(error: Exception) -> bool:
    """Say whether MLflow may take later what it does not take now: no connection, or its database is away."""
    code = getattr(error, "error_code", None)  # of MlflowException; requests' own errors are OSErrors
    return isinstance(error, OSError) if code is None else code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


def connect(uri: str) -> Any:
    """Return an MLflow client that calls nobody else and says nothing below a warning."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


# --- what is written ------------------------------------------------------------------------------------------------


class Written:
    """One MLflow run, and which points of it are there already."""

    def __init__(self, client: Any, run_id: str, *, new: bool) -> None:
        self.run_id = run_id
        self._client, self._new = client, new
        self._there: dict[str, dict[int, float]] = {}

    def log(self, points: Iterable[Point], *, model_id: str | None = None, revise: bool = False) -> None:
        """Log the points that are not there; with `revise`, also those that are there with another value."""
        from mlflow.entities import Metric

        now, fresh = int(time.time() * 1000), []
        for name, value, step in points:
            there = self._values(name)
            if not math.isfinite(value) or (step in there and not (revise and there[step] != value)):
                continue
            there[step] = value
            fresh.append(Metric(name, value, now, step, model_id=model_id, run_id=self.run_id))
        try:
            for start in range(0, len(fresh), BATCH):
                self._client.log_batch(self.run_id, metrics=fresh[start : start + BATCH])
        except Exception:
            self._there, self._new = {}, False  # it may have been taken or not: asked again before the next try
            raise

    def _values(self, name: str) -> dict[int, float]:
        if name not in self._there:
            history = [] if self._new else self._client.get_metric_history(self.run_id, name)
            self._there[name] = {point.step: point.value for point in history}
        return self._there[name]


class Record:
    """What MLflow holds of one campaign. Every method may be called again: it adds what is missing."""

    def __init__(self, uri: str, config: RunConfig, campaign: Campaign) -> None:
        self._uri, self._config, self._campaign = uri, config, campaign
        self._children: dict[tuple[str, str | None], Written] = {}
        self._models: dict[tuple[str, str], str] = {}

    @cached_property
    def _client(self) -> Any:
        return connect(self._uri)

    @cached_property
    def _experiment(self) -> str:
        name, local = self._config.tracking.experiment, self._uri.startswith("sqlite:")
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        artifacts = (self._campaign.root.resolve() / "mlartifacts").as_uri() if local else None
        return self._client.create_experiment(name, artifact_location=artifacts)

    @cached_property
    def _identity(self) -> dict[str, str]:
        """Tags that find the campaign's run again. The id lies in the folder: a new folder is a new campaign."""
        path = self._campaign.folder / "mlflow.json"
        found = store.read_json(path)
        if found is None:
            store.write_json(path, found := {"id": uuid.uuid4().hex})
        return {"srlm.campaign": self._campaign.name, "srlm.id": found["id"]}

    @cached_property
    def _parent(self) -> Written:
        found = self._find(self._identity | {"srlm.role": "campaign"})
        tags = self._identity | {"srlm.role": "campaign", "srlm.folder": str(self._campaign.folder)}
        if found is None:
            run = self._client.create_run(self._experiment, run_name=self._campaign.name, tags=tags)
            return Written(self._client, run.info.run_id, new=True)
        self._client.update_run(found.info.run_id, status="RUNNING")
        return Written(self._client, found.info.run_id, new=False)

    def begin(self) -> None:
        """Find or make the campaign's run, and say what it runs."""
        run = self._client.get_run(self._parent.run_id)
        chosen = settings.flat(self._config)
        for name in PARAMS:
            if name not in run.data.params:  # a parameter cannot change; config.json has today's value
                self._client.log_param(self._parent.run_id, name, chosen[name])
        self.tag({"config_hash": store.digest(chosen), "iterations": str(self._config.iterations)})

    def end(self, status: str) -> None:
        """Attach what the campaign says of itself, and close its run."""
        folder = self._campaign.folder
        for name in ("config.json", "provenance.json", "timings.json", "usage.json"):
            if (folder / name).exists():
                self._client.log_artifact(self._parent.run_id, str(folder / name))
        if self._campaign.report.is_dir():
            self._client.log_artifacts(self._parent.run_id, str(self._campaign.report), "report")
        self._client.set_terminated(self._parent.run_id, status)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Tag the campaign's run."""
        for name, value in tags.items():
            self._client.set_tag(self._parent.run_id, name, value)

    def where(self) -> str:
        """Say how to see the campaign's run."""
        if self._uri.startswith("http"):
            return f"{self._uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{self._parent.run_id}"
        return f"mlflow ui --backend-store-uri {self._uri}"

    def grow(self, model: str, points: Iterable[Point]) -> None:
        """Add points to the curve of a training that is under way."""
        self._child(model, None).log(points)

    def trained(self, model: str) -> None:
        """Log a finished training: its curve, what it was trained on, and the model."""
        marker = weights.marker(self._campaign.folder, model)
        if marker is None:
            return
        child = self._child(model, marker["digest"])
        child.log(_points(summary.training_curve(self._campaign.folder, model)))
        inputs = list(self._datasets(model))
        if inputs:
            self._client.log_inputs(child.run_id, inputs)
        self._samples(model, child.run_id)
        self._model(model, marker)
        if re.fullmatch(r"M[1-9]\d*", model):
            self._version(model, marker)
        self._client.set_terminated(child.run_id, "FINISHED")

    def _samples(self, model: str, run_id: str) -> None:
        """Log the first rows of the pairs that a model was trained on, as a table; once."""
        number = re.fullmatch(r"M([2-9]|\d\d+)", model)
        rows = summary.sample_pairs(self._campaign.folder, int(number[1]) - 1) if number else []
        if rows and not any(one.path == SAMPLES for one in self._client.list_artifacts(run_id)):
            self._client.log_table(run_id, {name: [row[name] for row in rows] for name in rows[0]}, SAMPLES)

    def evaluated(self, model: str) -> None:
        """Log what was measured of a model, under the model."""
        digest = (summary.evaluation_results(self._campaign.folder, model) or {}).get("digest")
        if digest is None:
            return
        marker = weights.marker(self._campaign.folder, model) or {"digest": digest}
        number = re.fullmatch(r"M(\d+)", model)
        run, step = (self._parent, int(number[1])) if number else (self._child(model, marker["digest"]), 0)
        measured = summary.model_metrics(self._campaign.folder, model)
        points = [Point(name, value, step) for name, value in measured.items()]
        run.log(points, model_id=self._model(model, marker), revise=True)

    def iteration(self, t: int) -> None:
        """Log iteration t: what M_t made and how it was measured, and the training of M_{t+1}."""
        self.trained(f"M{t + 1}")
        self.evaluated(f"M{t}")
        measured = summary.iteration_metrics(self._campaign.folder, t)
        self._parent.log([Point(name, value, t) for name, value in measured.items()], revise=True)

    def held(self, t: int) -> None:
        """Log what M_t came to at its gates: 1 passed, 0 failed, else nothing. `champion` moves to it if it passed."""
        found = gates.read(self._campaign.folder)
        if t not in found:
            return
        asked = found[t]
        known = [(gate.name, float(gate.passed)) for gate in asked if gate.passed is not None]
        self._parent.log([Point(f"gate/{name}", passed, t) for name, passed in known], revise=True)
        self.tag({f"gate/M{t}": gates.in_words(asked)})
        marker = weights.marker(self._campaign.folder, f"M{t}")
        # the last one that passed, also where MLflow was away when it did
        if marker is not None and t == max((s for s, of in found.items() if gates.verdict(of)), default=None):
            self._registry.crown(self._version(f"M{t}", marker))

    def everything(self) -> None:
        """Go over the whole folder: what an earlier attempt missed is made up for."""
        folder = self._campaign.folder
        for t in summary.iterations(folder):
            self.iteration(t)
        for model in summary.models(folder):
            self.trained(model)
            self.evaluated(model)
        for t in gates.read(folder):
            self.held(t)
        self.spent(self._config.iterations + 1, self.usage())

    def usage(self) -> Mapping[str, Mapping[str, float]]:
        """Read what each stage has spent so far."""
        return store.read_json(self._campaign.folder / "usage.json") or {}

    def spent(self, t: int, used: Mapping[str, Mapping[str, float]]) -> None:
        """Log tokens and engine hours per stage, spent up to step t."""
        for stage, so_far in used.items():
            tokens, hours = float(so_far["tokens"]), so_far["seconds"] / 3600
            points = [Point(f"{stage}/tokens_so_far", tokens, t), Point(f"{stage}/engine_hours_so_far", hours, t)]
            self._parent.log(points)

    def _child(self, model: str, digest: str | None) -> Written:
        """Return the run of a model's training: the one under way, or the one that ended in these weights."""
        if (model, digest) not in self._children:
            self._children[model, digest] = self._children.pop((model, None), None) or self._open_child(model, digest)
            if digest is not None:
                self._client.set_tag(self._children[model, digest].run_id, "srlm.digest", digest)
        return self._children[model, digest]

    def _open_child(self, model: str, digest: str | None) -> Written:
        tags = self._identity | {"srlm.role": "training", "srlm.model": model}
        found = self._find(tags)
        if found is not None and found.data.tags.get("srlm.digest") in (None, digest):
            return Written(self._client, found.info.run_id, new=False)
        number = re.fullmatch(r"M(\d+)", model)
        name = f"iteration {int(number[1]) - 1}" if number and int(number[1]) > 1 else f"bootstrap {model}"
        tags |= {"mlflow.parentRunId": self._parent.run_id}
        run = self._client.create_run(self._experiment, run_name=name, tags=tags)
        return Written(self._client, run.info.run_id, new=True)

    def _find(self, tags: Mapping[str, str]) -> Any:
        """Return the newest run that has all of the tags."""
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        newest = ["attributes.start_time DESC"]
        found = self._client.search_runs([self._experiment], wanted, order_by=newest, max_results=1)
        return found[0] if found else None

    def _datasets(self, model: str) -> Iterator[Any]:
        """Describe what a model was trained on by path, digest and columns; no row is read."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        folder, number = self._campaign.folder, re.fullmatch(r"M(\d+)", model)
        if number and int(number[1]) > 1:
            home = self._campaign.iteration(int(number[1]) - 1)
            found = {f"{home.name}/{name}": store.parts(home / name) for name in DATASETS}
        else:
            files = ("ift",) if model == summary.BASELINE else ("ift", "eft") if number and number[1] == "1" else ()
            found = {f"bootstrap/{name}": [folder / "bootstrap" / f"{name}.parquet"] for name in files}
        for name, paths in found.items():
            described = describe([path for path in paths if path.exists()])
            if described is not None:
                source = json.dumps({"uri": (folder / name).as_uri()})
                dataset = Dataset(name, described.digest, "local", source, described.schema, described.profile)
                yield DatasetInput(dataset, [InputTag("mlflow.data.context", name.rpartition("/")[2])])

    def _model(self, model: str, marker: Mapping[str, Any]) -> str:
        """Return the id of the logged model of these weights; make it, with the checkpoint if that is small enough."""
        key = (model, marker["digest"])
        if key not in self._models:
            logged = _find_model(self._client, self._experiment, self._identity["srlm.id"], *key)
            logged = logged or self._new_model(model, marker)
            if str(logged.status) != "READY":
                self._upload(logged, model)
            self._models[key] = logged.model_id
        return self._models[key]

    @cached_property
    def _registry(self) -> Registry:
        name = self._config.tracking.registered_model or re.sub(r"[/:'\"]", "_", self._campaign.name)
        return Registry(self._client, name)

    def _version(self, model: str, marker: Mapping[str, Any]) -> Any:
        """Return the registered version of these weights of M_t."""
        model_id = self._model(model, marker)
        tags = self._identity | {"srlm.model": model, "srlm.digest": marker["digest"]}
        return self._registry.version(model_id, self._child(model, marker["digest"]).run_id, tags)

    def _new_model(self, model: str, marker: Mapping[str, Any]) -> Any:
        trained_from, reference = (marker.get(name) or ("", "") for name in ("init_from", "reference"))
        path = self._campaign.model(model) if "kind" in marker else self._config.model.path
        tags = self._identity | {
            "srlm.model": model, "srlm.digest": marker["digest"], "path": str(path), "digest": marker["digest"],
            "trained_from": " ".join(trained_from), "reference": " ".join(reference),
        }  # fmt: skip
        params = {name: str(marker[name]) for name in ("kind", "rows", "steps") if name in marker}
        params["trained_from"] = trained_from[0]
        source = self._child(model, marker["digest"]) if "kind" in marker else self._parent
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", f"{self._campaign.name}-{model}")
        known = {key: value for key, value in params.items() if value}
        return self._client.create_logged_model(self._experiment, name, source.run_id, tags, known, "causal-lm")

    def _upload(self, logged: Any, model: str) -> None:
        """Store the checkpoint, or only where it lies; then call the model ready."""
        from mlflow.models.utils import get_external_mlflow_model_spec

        folder = self._campaign.model(model)
        with tempfile.TemporaryDirectory() as aside:  # without this file the model could not be registered
            get_external_mlflow_model_spec(logged).save(str(Path(aside) / "MLmodel"))
            self._client.log_model_artifacts(logged.model_id, aside)
        there = folder.is_dir() and not weights.are_dropped(folder)
        stored = there and megabytes(folder) < self._config.tracking.upload_below_mb
        if stored:
            self._client.log_model_artifacts(logged.model_id, str(folder), CHECKPOINT)
        self._client.set_logged_model_tags(logged.model_id, {"stored": str(stored).lower()})
        self._client.finalize_logged_model(logged.model_id, "READY")


def megabytes(folder: Path) -> float:
    """Size of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _points(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Turn rows of a training log into points, under one set of names for every training."""
    return [
        Point(f"training/{name}", float(value), int(row["step"]))
        for row in rows
        if row.get("step") is not None
        for name, value in row.items()
        if name not in NOT_A_CURVE and isinstance(value, int | float) and not isinstance(value, bool)
    ]


NOT_A_CURVE = ("step", "total_steps", "event")


class Described(NamedTuple):
    """A dataset without its rows."""

    digest: str
    schema: str
    profile: str


def describe(paths: list[Path]) -> Described | None:
    """Describe a dataset from the footers of its parts; None where it has none."""
    digests: list[str] = []
    rows, schema = 0, None
    for path in paths:
        meta = pq.read_metadata(path)
        digests.append((meta.metadata or {}).get(b"srlm.digest", b"").decode())
        rows, schema = rows + meta.num_rows, schema or meta.schema.to_arrow_schema()
    if schema is None:
        return None
    columns = [{"name": field.name, "type": _type_of(field.type), "required": False} for field in schema]
    profile = {"num_rows": rows, "num_parts": len(paths)}
    return Described(store.digest(*digests), json.dumps({"mlflow_colspec": columns}), json.dumps(profile))


def _type_of(kind: pa.DataType) -> str:
    """Name a column's type as MLflow does; nested ones show as strings."""
    if pa.types.is_floating(kind):
        return "double"
    return ("integer" if kind.bit_width <= 32 else "long") if pa.types.is_integer(kind) else "string"


# --- and read back --------------------------------------------------------------------------------------------------


def _find_model(client: Any, experiment: str, campaign_id: str, model: str, digest: str | None = None) -> Any:
    wanted = {"srlm.id": campaign_id, "srlm.model": model} | ({"srlm.digest": digest} if digest else {})
    spelled = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
    newest = [{"field_name": "creation_time", "ascending": False}]
    found = client.search_logged_models([experiment], spelled, max_results=1, order_by=newest)
    return found[0] if found else None


def restore_model(uri: str, run_id: str, model: str, target: Path, *, digest_of: Callable[[Path], str]) -> Path:
    """Bring M_t of a campaign's run back from MLflow: its stored checkpoint, or the one that is referenced.

    `digest_of` is the backend's. Raises ModelError where the run has no such model, or its weights are others by now.
    """
    client = connect(uri)
    run = client.get_run(run_id)
    logged = _find_model(client, run.info.experiment_id, run.data.tags["srlm.id"], model)
    if logged is None:
        raise ModelError(f"expected a logged model {model!r} in MLflow run {run_id} at {uri}, there is none.")
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if logged.tags.get("stored") == "true":
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory(dir=_made(target.parent)) as scratch:
            uri_of = f"{logged.artifact_location.rstrip('/')}/{CHECKPOINT}"
            Path(download_artifacts(artifact_uri=uri_of, dst_path=scratch, tracking_uri=uri)).rename(aside)
    else:
        shutil.copytree(_present(Path(logged.tags["path"]), model), aside)
    found = digest_of(aside)
    if found != logged.tags["digest"]:
        shutil.rmtree(aside)
        raise ModelError(
            f"expected the weights of {model} with digest {logged.tags['digest']}, got {found} from "
            f"{logged.tags['path']}: they were trained again or damaged since."
        )
    aside.rename(target)
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _present(path: Path, model: str) -> Path:
    if not path.is_dir():
        raise ModelError(f"expected the checkpoint of {model} in {path}, there is none: MLflow only refers to it.")
    return path
