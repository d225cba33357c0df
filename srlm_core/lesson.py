"""lesson: one training run of a campaign, found made, gone on with, or begun; and what it leaves behind."""

import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from srlm_core import schemas, settings, store, training, weights
from srlm_core.backend import Model
from srlm_core.config import DpoConfig, OnlineConfig, RewardConfig, RunConfig, SftConfig
from srlm_core.engines.training_job import TrainingJob, TrainingResult
from srlm_core.executor import Work
from srlm_core.run import Run
from srlm_core.store import digest
from srlm_core.weights import MARKER

ROWS = {"sft": schemas.EXAMPLES, "dpo": schemas.PREFERENCES, "reward": schemas.RANKINGS, "online": schemas.QUERIES}


class Lesson(NamedTuple):
    """One training run of the campaign: which model comes of what."""

    name: str
    kind: Literal["sft", "dpo", "reward", "online"]
    rows: Callable[[], Iterable[pa.Table]]
    """Reads the rows from their beginning, a piece at a time: all of an iteration's need not fit the memory."""
    config: SftConfig | DpoConfig | RewardConfig | OnlineConfig
    init: Model
    reference: Model | None
    folder: Path
    reward: Model | None = None
    """Who rewards what is sampled on the way."""

    @property
    def schema(self) -> pa.Schema:
        return ROWS[self.kind]

    @property
    def work_dir(self) -> Path:
        """Rows, checkpoints and log; the models of the bootstrap, and those taught on the way, are kept apart."""
        training_dir = self.folder / "training"
        on_the_way = not re.fullmatch(r"M\d+", self.name)
        return training_dir / self.name if on_the_way or self.folder.name == "bootstrap" else training_dir

    def fingerprint(self, config: RunConfig) -> str:
        """Hash what the trained weights depend on; of its settings, what holds in its iteration."""
        now = config.model_copy(update={"training": config.training.model_copy(update={self.kind: self.config})})
        return digest(
            {
                "version": training.VERSION, "kind": self.kind, "seed": config.seed,
                "rows": store.rows_digest(self.rows(), self.schema),
                "settings": settings.pick(now, (f"training.{self.kind}",)),
                "init": self.init.digest, "reference": self.reference.digest if self.reference else None,
                **({"reward": self.reward.digest} if self.reward else {}),
            },
            length=32,
        )  # fmt: skip


def teach(run: Run, lesson: Lesson) -> Model:
    """Train one model, as a piece of work that the executor shows."""
    return run.executor.run(Work("training", f"training {lesson.name}", partial(_find_or_train, run, lesson)))


def take_as(run: Run, name: str, taught: Model) -> None:
    """Give a model another name in the campaign: nothing is trained twice, and no weight is copied where links work."""
    output, marker = run.campaign.model(name), store.read_json(taught.path / MARKER)
    if store.read_json(output / MARKER) == marker and run.has(taught._replace(path=output)):
        return
    _link_model(run.with_weights(taught).path, output)
    run.tell("note", text=f"{name} is {taught.name}: this method teaches no judging")


def _link_model(source: Path, target: Path) -> None:
    """Give a finished model a second place; its marker comes last."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=store.link_or_copy, ignore=shutil.ignore_patterns(MARKER))
    store.link(source / MARKER, target / MARKER)


def _take_from_another(run: Run, lesson: Lesson, made_from: str) -> Model | None:
    """Link a model that another campaign trained on the same rows, with its log; None where there is none."""
    output, work_dir = run.campaign.model(lesson.name), lesson.work_dir
    drops = _drops_of(lesson)
    for model, work, left_out in run.campaign.elsewhere(output, work_dir, drops):
        marker = store.read_json(model / MARKER)
        same = marker and marker["fingerprint"] == made_from and not weights.are_dropped(model)
        if same and run.backend.digest(model) == marker["digest"]:
            shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)  # of a training that was cut short
            for path in work.glob("*.parquet"):
                store.link(path, work_dir / path.name)
            if left_out.exists():
                store.link(left_out, drops)
            _link_model(model, output)
            run.tell("note", text=f"{lesson.name} is that of {model.parents[1].name}: the same rows, settings and seed")
            return Model(lesson.name, output, marker["digest"])
    return None


def _fetch(run: Run, lesson: Lesson, made_from: str) -> Model | None:
    """Fetch a model that the mirror holds, with its log; None where it has none that was made from the same things."""
    output, work_dir = run.campaign.model(lesson.name), lesson.work_dir
    marker = run.mirror.read_json(output / MARKER) if run.mirror else None
    if run.mirror is None or not marker or marker["fingerprint"] != made_from:
        return None
    run.tell("note", text=f"{lesson.name} is fetched from {run.mirror.url}")
    shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)  # of a training that was cut short
    run.mirror.fetch_folder(output, but=[MARKER])
    if run.backend.digest(output) != marker["digest"]:
        run.tell("note", text=f"{lesson.name} in {run.mirror.url} is damaged, and is trained again")
        return None
    run.mirror.fetch_folder(work_dir)
    run.mirror.fetch(_drops_of(lesson))
    run.mirror.fetch(output / MARKER)
    return Model(lesson.name, output, marker["digest"])


def _drops_of(lesson: Lesson) -> Path:
    return lesson.folder / "drops" / f"part-training-{lesson.name}.parquet"


def _find_or_train(run: Run, lesson: Lesson) -> Model:
    """Train one model, go on from its last checkpoint, or find it made."""
    output, made_from = run.campaign.model(lesson.name), lesson.fingerprint(run.config)
    marker = store.read_json(output / MARKER)
    if marker and marker["fingerprint"] == made_from:
        made = Model(lesson.name, output, marker["digest"])
        if run.has(made):
            return made
    if taken := _take_from_another(run, lesson, made_from) or _fetch(run, lesson, made_from):
        return taken
    with run.phase(f"training {lesson.name}"):
        result = _train_again(run, lesson, made_from)
    trained, reference = Model(lesson.name, output, run.backend.digest(output)), lesson.reference
    store.write_json(
        output / MARKER,
        {
            "fingerprint": made_from, "digest": trained.digest, "kind": lesson.kind, "rows": result.n_rows,
            "init_from": [lesson.init.name, lesson.init.digest],
            "reference": [reference.name, reference.digest] if reference else None,
            **({"reward": [lesson.reward.name, lesson.reward.digest]} if lesson.reward else {}),
            **({"tokens": result.generated_tokens} if result.generated_tokens else {}),
            "steps": result.steps, "seconds": round(result.seconds, 1),
        },
    )  # fmt: skip
    shutil.rmtree(lesson.work_dir / "checkpoints", ignore_errors=True)
    run.sampled(lesson.name, result)
    run.tell("model", model=trained, result=result, kind=lesson.kind)
    return trained


def _train_again(run: Run, lesson: Lesson, made_from: str) -> TrainingResult:
    work_dir = lesson.work_dir
    stamp = store.stamp_of(work_dir / "rows.parquet")
    if stamp is None or stamp.fingerprint != made_from:
        shutil.rmtree(work_dir, ignore_errors=True)  # checkpoints of other rows or settings must not be continued
    kept, held = work_dir / "rows.parquet", work_dir / "heldout.parquet"
    share = lesson.config.heldout_share
    store.write_stream(kept, (training.hold_out(rows, share)[0] for rows in lesson.rows()), lesson.schema, made_from)
    if share:
        aside = (training.hold_out(rows, share)[1] for rows in lesson.rows())
        store.write_stream(held, aside, lesson.schema, made_from)
    job = TrainingJob(
        kind=lesson.kind,
        rows=kept,
        heldout=held if share and pq.read_metadata(held).num_rows else None,
        init_from=run.with_weights(lesson.init).path,
        reference=run.with_weights(lesson.reference).path if lesson.reference else None,
        reward_model=run.with_weights(lesson.reward).path if lesson.reward else None,
        output=run.campaign.model(lesson.name),
        work_dir=work_dir,
        settings=lesson.config,
        seed=run.config.seed,
        trust_remote_code=run.config.model.trust_remote_code,
        threads=run.config.engine.threads,
        launcher=run.config.training.launcher,
        ranks=run.config.training.ranks,
        fsdp=run.config.training.fsdp,
        ray_address=run.config.engine.ray_address,
    )
    shutil.rmtree(job.output, ignore_errors=True)
    attempts = len(list(run.campaign.logs.glob(f"training_{lesson.name}_*.log")))
    progress = partial(run.tell, "training", model=lesson.name)
    result = run.backend.train(
        job,
        log=run.campaign.logs / f"training_{lesson.name}_{attempts + 1}.log",
        on_progress=lambda event: progress(progress=event),
    )
    _keep_training_log(result, lesson, made_from)
    return result


def _keep_training_log(result: TrainingResult, lesson: Lesson, made_from: str) -> None:
    """Keep the curve as a table, and the rows that were too long among the drops."""
    folder, name = lesson.folder, lesson.name
    t = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else 0
    columns = sorted({key for row in result.log for key in row})
    curve = pa.table({key: pa.array([row.get(key) for row in result.log]) for key in columns})
    store.write_part(lesson.work_dir / "log.parquet", curve, made_from)
    drops = [
        {"id": row_id, "stage": "training", "reason": reason, "iteration": t, "detail": f"{name}: {n_tokens} tokens"}
        for row_id, reason, n_tokens in result.dropped
    ]
    store.write_part(_drops_of(lesson), schemas.table(drops, schemas.DROPS), made_from)
