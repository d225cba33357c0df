"""Rows of a training and their tokens: nothing is cut; a row that is too long is left out, and said so.

Imported by the training child alone, which pays for transformers and datasets at the top (engines/trl.py).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import AutoConfig, GenerationConfig

from srlm_core import schemas
from srlm_core.config import DpoConfig, OnlineConfig, RewardConfig
from srlm_core.engines import losses
from srlm_core.engines.callbacks import Report
from srlm_core.engines.rendering import Asked, Renderer
from srlm_core.engines.trainers import BLANK
from srlm_core.engines.training_job import DroppedRow, TrainingJob
from srlm_core.errors import TrainingFailed

_COMPLETIONS = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "reward": (), "online": ()}
_NUMBERS = {"sft": (), "dpo": ("label", "weight", "chosen_score", "rejected_score"), "reward": (), "online": ()}
_RANKED = {"reward": ("responses", "ranks")}
QUESTIONS = ("asked_ab", "asked_ba")
"""Which of the two is better, chosen shown first and rejected shown first; for a loss that asks the model."""
_EXPECTED = {
    "label": ("a number from 0 to 1, the probability that chosen is better", "Write 1 for a pair that is certain."),
    "weight": ("a number from 0 up, how much the row counts", "Write 1 for a row like any other."),
    **dict.fromkeys(
        ("chosen_score", "rejected_score"),
        ("a number from 0 to 1, the probability of winning", "Give such scores, or set training.dpo.loss=sigmoid."),
    ),
}
"""What must stand beside a pair that is trained on, and what to do where it does not."""


class Tokenized(NamedTuple):
    """A row as the trainer wants it: token ids of the prompt and of each completion."""

    id: str
    prompt: list[int]
    completions: tuple[list[int], ...]
    numbers: dict[str, float | None]
    """What stands beside the texts: label, weight and scores of a pair."""
    questions: tuple[Asked, ...] = ()
    """What the loss asks the model of a pair, in both orders, up to where it would say `A` or `B`; and those tokens."""
    ranks: tuple[int, ...] = ()
    """Of a ranking's texts, which stand as completions of no prompt: 0 = best."""
    room: int = 0
    """Most tokens of a completion that is still to be sampled."""
    messages: Sequence[dict[str, str]] = ()
    """What is asked, for a trainer that renders it itself."""

    @property
    def n_tokens(self) -> int:
        """Length of the longest sequence that training would see."""
        return max(
            len(self.prompt) + max(map(len, self.completions), default=self.room),
            *(len(asked.prompt) for asked in self.questions), 0,
        )  # fmt: skip


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read a job's Parquet file; raises TrainingFailed with words if it is not one."""
    columns = ["id", "prompt", *_COMPLETIONS[kind], *_NUMBERS[kind], *_RANKED.get(kind, ())]
    try:
        found = pq.read_schema(path).names
        if missing := [column for column in columns if column not in found]:
            raise TrainingFailed(
                f"training ({kind}): expected the columns {', '.join(columns)} in {path}, got {', '.join(found)}; "
                f"missing: {', '.join(missing)}. Make the rows again."
            )
        columns += [column for column in QUESTIONS if column in found]
        rows = pq.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise TrainingFailed(
            f"training ({kind}): expected a Parquet file of rows at {path}, got: {error}. Make the rows again."
        ) from error
    if not rows:
        raise TrainingFailed(
            f"training ({kind}): expected rows in {path}, got none. Nothing can be learnt from no row."
        )
    return rows


def load_rows(
    job: TrainingJob, tokenizer: Any, report: Report
) -> tuple[list[Tokenized], list[Tokenized], list[DroppedRow]]:
    """Tokenize rows and held-out rows; leave out, count and report first what is longer than max_length."""
    if tokenizer.chat_template is None:
        raise TrainingFailed(
            f"training ({job.kind}): expected a chat template in {job.init_from}, got none. Add a chat_template.jinja."
        )
    tokens_of = tokenizer_of(job, tokenizer)
    sources = [("too_long", job.rows)] + ([("heldout_too_long", job.heldout)] if job.heldout is not None else [])
    kept: dict[str, list[Tokenized]] = {"too_long": [], "heldout_too_long": []}
    dropped = []
    for reason, path in sources:
        for row in read_rows(path, job.kind):
            tokenized = tokens_of(row)
            if tokenized.n_tokens > job.settings.max_length:
                dropped.append(DroppedRow(tokenized.id, reason, tokenized.n_tokens))
                report(event="dropped", **dropped[-1]._asdict())
            else:
                kept[reason].append(tokenized)
    report(event="rows", n_rows=len(kept["too_long"]), n_heldout=len(kept["heldout_too_long"]), n_dropped=len(dropped))
    for reason, path in sources:
        if not kept[reason]:
            shortest = min(row.n_tokens for row in dropped if row.reason == reason)
            raise TrainingFailed(
                f"training ({job.kind}): expected rows of at most max_length={job.settings.max_length} tokens in "
                f"{path}, got none: the shortest has {shortest}. Raise max_length."
            )
    return kept["too_long"], kept["heldout_too_long"], dropped


def tokenizer_of(job: TrainingJob, tokenizer: Any) -> Callable[[dict[str, Any]], Tokenized]:
    """Return what makes tokens of a row of the job's kind."""
    settings = job.settings
    ends = end_tokens(tokenizer, _generation_config(job.init_from))
    renderer = Renderer(job.init_from, trust_remote_code=job.trust_remote_code)

    def of_row(row: dict[str, Any]) -> Tokenized:
        if isinstance(settings, RewardConfig):
            from srlm_core.engines.reward_training import texts_of

            return Tokenized(row["id"], [], texts_of(row, renderer), {}, ranks=tuple(row["ranks"]))
        if isinstance(settings, OnlineConfig):
            prompt = renderer.prompt(row["prompt"], "")
            return Tokenized(row["id"], prompt, (), {}, room=settings.sampling.max_tokens, messages=row["prompt"])
        if isinstance(settings, DpoConfig):
            check_numbers(row, settings)
        tokenized = tokenize(row, job.kind, tokenizer, ends)
        if isinstance(settings, DpoConfig) and not settings.labelled:
            return tokenized._replace(questions=questions(row, renderer))
        return tokenized

    return of_row


def check_numbers(row: dict[str, Any], settings: DpoConfig) -> None:
    """Raise TrainingFailed unless what the loss reads beside the texts is there and in its range."""
    for name in losses.reads(settings):
        value, most = row[name], sys.float_info.max if name == "weight" else 1.0
        if not isinstance(value, int | float) or not 0 <= value <= most:
            expected, remedy = _EXPECTED[name]
            raise TrainingFailed(
                f"training (dpo): expected {name} to be {expected}, as loss={settings.loss} reads it, got "
                f"{'null' if value is None else value} (row {row['id']}). {remedy}"
            )


def tokenize(row: dict[str, Any], kind: str, tokenizer: Any, ends: set[int]) -> Tokenized:
    """Render a row with the chat template: the prompt up to where the assistant speaks, then each completion.

    A completion goes from there to its end-of-turn token, which is its last token: exactly what sampling draws. It is
    tokenized apart from the prompt, as it was when it was drawn.
    """
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    completions = []
    for column in _COMPLETIONS[kind]:
        text = tokenizer.apply_chat_template(row["prompt"] + row[column], tokenize=False)
        if not text.startswith(prompt):
            raise TrainingFailed(
                f"training: expected the chat template to render a prompt as the beginning of prompt and response, got "
                f"{text[: len(prompt)][-80:]!r} where the prompt ends with {prompt[-80:]!r} (row {row['id']}). "
                "The model would be trained on another context than it answers in: mend the chat template."
            )
        ids = _ids(tokenizer, text[len(prompt) :])
        last = max((i for i, token in enumerate(ids) if token in ends), default=None)
        if last is None:
            raise TrainingFailed(
                f"training: expected the chat template to end the assistant's turn with an end-of-turn token "
                f"({', '.join(tokenizer.convert_ids_to_tokens(sorted(ends)))}), got {text[len(prompt) :][-40:]!r} "
                f"(row {row['id']}). A model trained on this never stops: set eos_token to what the template writes."
            )
        completions.append(ids[: last + 1])
    numbers = {name: row[name] for name in _NUMBERS[kind]}
    return Tokenized(row["id"], _ids(tokenizer, prompt), tuple(completions), numbers)


def questions(row: dict[str, Any], renderer: Renderer) -> tuple[Asked, ...]:
    """Render what the loss asks of a pair, as an engine does; raises TrainingFailed where there is no question."""
    if missing := [name for name in QUESTIONS if not row.get(name)]:
        raise TrainingFailed(
            f"training (dpo): expected {missing[0]} to ask which response is better, as loss=scir puts it to the "
            f"model, got null (row {row['id']}). Lay the rows out for this loss, or set another training.dpo.loss."
        )
    return tuple(renderer.choices(row[name], schemas.BETTER_LINE, schemas.SHOWN) for name in QUESTIONS)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _generation_config(model: Path) -> GenerationConfig:
    if (model / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(model)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))


def end_tokens(tokenizer: Any, generation: GenerationConfig) -> set[int]:
    """Tokens that end an assistant's turn: what generation stops at."""
    declared = generation.eos_token_id
    ends = {declared} if isinstance(declared, int) else set(declared or ())
    return ends | ({tokenizer.eos_token_id} - {None})


def as_dataset(rows: Sequence[Tokenized], kind: str) -> Dataset:
    """Columns as the trainer names them, tokenized; a trainer that samples is given messages."""
    if kind == "online":
        return Dataset.from_list([{"prompt": row.messages} for row in rows])
    if kind == "reward":
        return Dataset.from_dict({
            "texts": [row.completions for row in rows], "ranks": [row.ranks for row in rows],
        })  # fmt: skip
    if kind == "sft":
        return Dataset.from_dict({
            "input_ids": [row.prompt + row.completions[0] for row in rows],
            "labels": [[-100] * len(row.prompt) + row.completions[0] for row in rows],
        })  # fmt: skip
    return Dataset.from_dict({
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.completions[0] for row in rows],
        "rejected_ids": [row.completions[1] for row in rows],
        **{name: [row.numbers[name] for row in rows] for name in _NUMBERS[kind]},
        **{name: [list(row.questions[i]) for row in rows] for i, name in enumerate(QUESTIONS) if rows[0].questions},
    })  # fmt: skip


def blank_rows(rows: Sequence[Tokenized], multiple: int) -> list[Tokenized]:
    """Rows that say nothing, as many as are missing to a multiple (trainers.Ours)."""
    seen = rows[0]
    numbers: dict[str, float | None] = dict.fromkeys(seen.numbers, 0.0)  # the weight with them
    nothing = tuple([] for _ in seen.completions)
    blank = seen._replace(id="", prompt=seen.prompt[:1] * BLANK, completions=nothing, numbers=numbers)
    if seen.ranks:  # a reward model is shown one text, which is no better than any other
        blank = blank._replace(completions=(seen.completions[0][:BLANK],), ranks=(0,))
    return [blank] * (-len(rows) % multiple)
