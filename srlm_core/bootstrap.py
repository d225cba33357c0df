"""bootstrap: sft_baseline and M1 from M0, by the data that people wrote and ranked."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from srlm_core import judgments, store, training
from srlm_core.config import RunConfig
from srlm_core.judge_data import judge_groups, keep_set_aside, self_taught_rows
from srlm_core.lesson import Lesson, take_as, teach
from srlm_core.methods import METHODS
from srlm_core.run import BASELINE, Run
from srlm_core.store import digest


def bootstrap(run: Run) -> None:
    """Train sft_baseline on IFT, and M1 on IFT + EFT, both from M0 (section 2.3).

    Where the method needs no judge, M1 is sft_baseline.
    """
    folder, config, seed = run.campaign.folder / "bootstrap", run.config, run.seed_data
    teaches_judging = METHODS[config.method].teaches(config)
    judged = teaches_judging and config.seed_data.eft_is_judged
    _forget_seed_data(folder, config.seed_data.eft_targets if judged else "")
    for name, lines in seed.set_aside.items():
        keep_set_aside(run, name, lines)
    with run.phase("base model"):
        base = run.base
    ift = _seed_rows(folder / "ift.parquet", training.ift_examples(seed.ift))
    teach(run, Lesson(BASELINE, "sft", lambda: [ift], config.training.sft, base, None, folder))
    if teaches_judging:
        eft_rows = _eft_rows(run, folder)
        teach(run, Lesson("M1", "sft", lambda: [ift, eft_rows], config.training.sft, base, None, folder))
    else:
        (folder / "eft.parquet").unlink(missing_ok=True)
        take_as(run, "M1", run.model(BASELINE))


def _eft_rows(run: Run, folder: Path) -> pa.Table:
    config, groups = run.config, run.seed_data.eft
    if config.seed_data.eft_targets == "self_taught":
        return _seed_rows(folder / "eft.parquet", self_taught_rows(run))
    if config.seed_data.eft_is_judged:
        groups = judge_groups(run, groups)
    asked = _asked_in_eft(config, groups)
    return _seed_rows(folder / "eft.parquet", training.eft_examples(groups, asked, config.seed_data.eft_form))


def _forget_seed_data(folder: Path, judged_for: str) -> None:
    """Drop what other settings left: a report must not tell of rows that this campaign did not see.

    `judged_for`: the targets that a model writes something for; empty for none.
    """
    shutil.rmtree(folder / "set_aside", ignore_errors=True)
    (folder / "eft.json").unlink(missing_ok=True)
    stale = () if judged_for == "self_taught" else ("modified", "answers")
    for name in stale if judged_for else (*stale, "judgments"):
        store.forget_later_parts(folder, name, 0)


def _seed_rows(path: Path, rows: pa.Table) -> pa.Table:
    made_from = digest("seed", path.stem, store.rows_digest([rows], rows.schema))
    stamp = store.stamp_of(path)
    if stamp is None or stamp.fingerprint != made_from:
        store.write_part(path, rows, made_from)
    return rows


def _asked_in_eft(config: RunConfig, groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """Render each judged response as the loop's judge will see it."""
    rubric = judgments.load_rubric(config.judgments.rubric, justified=config.seed_data.eft_form == "justified")
    return {
        (group["prompt"], response["text"]): rubric.ask(prompt=group["prompt"], response=response["text"])
        for group in groups
        for response in group["responses"]
    }
