"""annotating: what the annotator, whom the user names, says of the models' answers to the published benchmarks.

No model judges its own answers unawares: where it does, the results say so.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa

from srlm_core import judgments, store
from srlm_core.backend import Model
from srlm_core.engines.protocol import Engine
from srlm_core.errors import SrlmError
from srlm_core.executor import Pending, Work
from srlm_core.measuring import Lend, make_part, suite_shards, take_stock
from srlm_core.run import Run
from srlm_core.store import Made
from srlm_core.suites import Taken, record
from srlm_core.suites.record import Item, Suite, Tables

log = logging.getLogger("srlm")


@contextmanager
def meanwhile(run: Run, model: Model) -> Iterator[None]:
    """Let an endpoint judge a model's answers while something else goes on here: it needs nothing of this machine.

    What it fails to do is said, and done by `annotate` in the end: a campaign does not stop for it.
    """
    annotator, judged = _annotator(run), _judged_suites(run)
    if annotator is None or not annotator.served or model.name not in run.measured:
        yield
        return
    with run.engines() as lend:
        folder = run.campaign.folder / "evaluation" / model.name
        pending = [part for taken in judged.values() for part in _submit(run, folder, taken, annotator, lend)]
        yield
        for part in pending:
            try:
                part.result()
            except SrlmError as error:
                log.warning("the answers of %s are not all judged yet, and will be in the end: %s", model.name, error)
                break


def annotate(run: Run) -> None:
    """Let the annotator judge the answers of every model measured in this run, and add what comes of it."""
    annotator, judged = _annotator(run), _judged_suites(run)
    answered = [run.campaign.folder / "evaluation" / model for model in run.measured]
    if annotator is None or not judged or not answered:
        return
    with run.phase("judging benchmarks"), run.engines() as lend:
        pending = {
            (model, name): _submit(run, model, taken, annotator, lend)
            for model in answered
            for name, taken in judged.items()
        }
        for model in answered:
            results = store.read_json(model / "results.json")
            for name, taken in judged.items():
                verdicts = _joined(part.result().path for part in pending[model, name])
                measured = take_stock(model, taken, _joined(store.parts(model / name)), verdicts)
                by_itself = {"judged_by_itself": True} if annotator.digest == results["digest"] else {}
                results["suites"][name] = measured | {"judge": annotator.name} | by_itself
            store.write_json(model / "results.json", results)
            run.tell("evaluation", model=model.name, results=results)


def _annotator(run: Run) -> Model | None:
    name = run.config.evaluation.suites.annotator
    return None if name is None else run.role(name, run.base)


def _judged_suites(run: Run) -> Mapping[str, Taken]:
    return {name: taken for name, taken in run.seed_data.suites.items() if taken.suite.judged}


def _joined(paths: Iterable[Path]) -> pa.Table:
    return pa.concat_tables(store.read_part(path) for path in paths)


def _submit(run: Run, folder: Path, taken: Taken, annotator: Model, lend: Lend) -> list[Pending[Made]]:
    """Start the verdicts on one model's answers to one benchmark, a part for each part of the answers."""
    name, suite, config = taken.suite.name, taken.suite, run.config.evaluation.suites
    rubrics = [judgments.load_rubric(rubric, justified=None).identity for rubric in suite.rubrics]
    started: list[Pending[Made]] = []
    parts = store.parts(folder / name)
    store.forget_later_parts(folder, f"{name}_judged", len(parts))
    for number, (path, items) in enumerate(zip(parts, suite_shards(run, taken), strict=True)):
        rows = store.read_part(path)
        what = [name, record.VERSION, rubrics, config.annotation_tokens, store.rows_digest([rows], rows.schema)]
        make = partial(_judged, suite, items, rows, annotator.name, config.annotation_tokens, run.config.seed)
        part = partial(make_part, run, folder, f"{name}_judged", annotator, lend, make, what, number=number)
        shown = f"{name} of {folder.name} judged {number + 1}/{len(parts)}"
        started.append(run.executor.submit(Work("evaluation", shown, part)))
    return started


def _judged(
    suite: Suite, items: Sequence[Item], rows: pa.Table, name: str, max_tokens: int, seed: int, engine: Engine
) -> Tables:
    assert suite.judge is not None
    return suite.judge(items, rows, record.Judge(engine, name, max_tokens, seed))
