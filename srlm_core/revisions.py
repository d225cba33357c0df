"""revisions: the model finds fault with its own answers under written principles, and writes them again.

The supervised stage of Constitutional AI (arXiv:2212.08073 section 3.1): an answer, a critique under a principle drawn
from a list, a revision; and again, each time under a newly drawn one. What follows learns the last revision alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import judgments, schemas
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Completion, Engine, Message, Request, Sampling
from srlm_core.errors import ConfigError
from srlm_core.store import digest, seed_for

VERSION = 1
PRINCIPLES = Path(__file__).parent / "principles"

REVISIONS = pa.schema(
    [
        pa.field("revision_id", pa.string(), nullable=False),
        pa.field("response_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("principle", pa.string(), nullable=False),
        pa.field("critique", pa.string(), nullable=False),
        pa.field("revision", pa.string()),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)
"""response_id: the answer that is revised; round: from 0; principle: its id; revision: null where it was cut or empty,
and the rounds of that answer end."""


class Principle(NamedTuple):
    """What an answer is held against."""

    id: str
    text: str


def principles(name: str) -> list[Principle]:
    """Read a list by the name of a file in srlm_core/principles, or by path: one a line, `#` begins a comment.

    Raises ConfigError where there is no such file, or nothing in it.
    """
    path = PRINCIPLES / f"{name}.txt"
    path = path if path.exists() else Path(name).expanduser()
    if not path.is_file():
        there = sorted(path.stem for path in PRINCIPLES.glob("*.txt"))
        raise ConfigError(f"rlaif.principles: expected one of {there} or the path of a text file, got {name!r}.")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [Principle(digest(line, length=8), line) for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"rlaif.principles: expected a principle a line in {path}, got none.")
    return found


def drawn(among: Sequence[Principle], *where: Any) -> Principle:
    """Draw one, the same for the same seed and place."""
    return among[seed_for("principle", *where) % len(among)]


def texts(config: RunConfig) -> list[str]:
    """Identify the templates and principles that the revisions depend on."""
    rubrics = [judgments.load_rubric(name, justified=None).identity for name in ("critique", "revision")]
    return [*rubrics, *(principle.id for principle in principles(config.rlaif.principles))]


class _Draft(NamedTuple):
    """An answer on its way."""

    answer: Mapping[str, Any]
    asked: tuple[Message, ...]
    text: str


def revise(
    prompts: pa.Table,
    answers: Sequence[Mapping[str, Any]],
    engine: Engine,
    config: RunConfig,
    *,
    iteration: int,
    model: str,
) -> tuple[pa.Table, pa.Table]:
    """Revise each answer in `rlaif.rounds` rounds; rows REVISIONS, by answer and round, and DROPS.

    A round is one conversation: what was asked, the answer as it stands, the critique, the revision. Where that does
    not fit the context, or nothing was criticised, the answer is dropped with the number of the round.
    """
    asked = {row["prompt_id"]: tuple(row["messages"]) for row in prompts.to_pylist()}
    drafts = {row["response_id"]: _Draft(row, asked[row["prompt_id"]], row["response"]) for row in answers}
    rows: list[dict[str, Any]] = []
    drops: list[dict[str, object]] = []
    for number in range(config.rlaif.rounds):
        made = _one_round(drafts, engine, config, number, iteration, model)
        rows += made
        drops += [
            {
                "id": name,
                "stage": "revisions",
                "reason": "not_revised",
                "iteration": iteration,
                "detail": f"round {number}",
            }
            for name in drafts.keys() - {row["response_id"] for row in made}
        ]
        texts = {row["response_id"]: row["revision"] for row in made if row["revision"] is not None}
        drafts = {name: draft._replace(text=texts[name]) for name, draft in drafts.items() if name in texts}
    place = {row["response_id"]: number for number, row in enumerate(answers)}
    rows.sort(key=lambda row: (place[row["response_id"]], row["round"]))
    drops.sort(key=lambda row: place[row["id"]])
    return schemas.table(rows, REVISIONS), schemas.table(drops, schemas.DROPS)


def _one_round(
    drafts: Mapping[str, _Draft], engine: Engine, config: RunConfig, number: int, iteration: int, model: str
) -> list[dict[str, Any]]:
    """Criticise all drafts, then rewrite them; what does not fit the context has no row."""
    among = principles(config.rlaif.principles)
    critique, revision = (judgments.load_rubric(name, justified=None) for name in ("critique", "revision"))
    under = {name: drawn(among, config.seed, iteration, name, number) for name in drafts}
    talks = {
        name: (*draft.asked, _turn("assistant", draft.text), *critique.ask(principle=under[name].text))
        for name, draft in drafts.items()
    }
    critiques = _say(talks, engine, config, ("critique", iteration, number))
    talks = {
        name: (*talks[name], _turn("assistant", said.text), *revision.ask())
        for name, said in critiques.items()
        if said.text.strip()
    }
    revisions = _say(talks, engine, config, ("revision", iteration, number))
    return [
        {
            "revision_id": digest(name, iteration, model, number, under[name].id, done.text),
            "response_id": name,
            "prompt_id": drafts[name].answer["prompt_id"],
            "iteration": iteration,
            "round": number,
            "principle": under[name].id,
            "critique": critiques[name].text,
            "revision": done.text if done.finish_reason == "stop" and done.text.strip() else None,
            "finish_reason": done.finish_reason,
            "model": model,
            "seed": seed_for(config.seed, "revision", iteration, number, name),
        }
        for name, done in revisions.items()
    ]


def _say(
    talks: Mapping[str, tuple[Message, ...]], engine: Engine, config: RunConfig, where: tuple[Any, ...]
) -> dict[str, Completion]:
    how = config.responses.sampling
    sampling = Sampling(how.temperature, how.top_p, how.max_tokens)
    requests = [
        Request(name, messages=talk, sampling=sampling, seed=seed_for(config.seed, *where, name))
        for name, talk in talks.items()
    ]
    return {done.request_id: done for done in engine.generate(requests) if done.finish_reason != "too_long"}


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def last(rows: pa.Table) -> dict[str, dict[str, Any]]:
    """Return answer id to the row of its last revision that could be used."""
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows.to_pylist():
        if row["revision"] is not None and row["round"] >= found[row["response_id"]].get("round", 0):
            found[row["response_id"]] = row
    return {name: row for name, row in found.items() if row}
