"""judgments: a judge scores each response K times under a rubric (arXiv:2401.10020 section 2.2, figure 2).

Only the judge's own completion is read, never prompt plus completion. What could not be read is null with a reason:
nulls are counted and left out, they never become a number.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from srlm_core import reasoning, schemas
from srlm_core.config import JudgmentsConfig, RunConfig
from srlm_core.engines.protocol import Completion, Engine, Message, Request, Sampling
from srlm_core.errors import ConfigError
from srlm_core.schemas import SCORE_LINE
from srlm_core.store import digest, seed_for

DATASETS = ("judgments", "early_judgments", "future_judgments")
"""Where judgments of responses stand; see responses.DATASETS."""
VERSION = 1
SETTINGS = ("judgments.reading", "judgments.justified", "judgments.rubric", "judgments.sampling")
"""What one judgment depends on; how many there are changes none of them."""
RUBRICS = Path(__file__).parent / "rubrics"
POINTS = ("0", "1", "2", "3", "4", "5")

_TAGS = re.compile(r"<\s*(/?)\s*(request|response|judgment|rubric)\s*>", re.IGNORECASE)
_TAGS_OF_STEPS = re.compile(r"<\s*(/?)\s*(before|step)\s*>", re.IGNORECASE)
# a marker followed by a number, however odd the number is …
_MARKED = re.compile(r"\bscore\W{0,3}[:=][\s*_<\[(]*(?=[+-]?\d)", re.IGNORECASE)
# … and the numbers that are read: matched whole, never the first digit; no range, no decimal comma;
# group 2 = denominator
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)(?!\d|[.,]\d)(?!\s*[-–]\s*\d)(?:\s*/\s*(\d+))?")


class Verdict(NamedTuple):
    """What one judgment says: a number from 0 to 5, or null and why it could not be read."""

    value: float | None
    unreadable_reason: str | None


def parse_verdict(text: str, finish_reason: str) -> Verdict:
    """Read the score of a pointwise judgment: its last score line binds, for an earlier one may be a quotation.

    Decimals are read, an explicit denominator must be 5, ranges and numbers outside 0..5 are null, and so is
    every judgment that was cut off: `Score: 4` may have been going to be `4.5`.
    """
    if finish_reason != "stop":
        return Verdict(None, why_not_whole(finish_reason))
    marks = list(_MARKED.finditer(text))
    if not marks:
        return Verdict(None, "no_score_line")
    found = _NUMBER.match(text, marks[-1].end())
    if not found:
        return Verdict(None, "not_one_number")
    if found[2] is not None and float(found[2]) != 5:
        return Verdict(None, "other_scale")
    value = float(found[1])
    if not 0 <= value <= 5:
        return Verdict(None, "out_of_range")
    return Verdict(value, None)


def why_not_whole(finish_reason: str) -> str:
    """Say why a judgment that did not end by itself cannot be read."""
    return "truncated" if finish_reason == "length" else "no_answer"


class Rubric(NamedTuple):
    """A judge prompt: a template with its format line filled in, and a name that says which text it was."""

    name: str
    template: str

    @property
    def identity(self) -> str:
        """Name and hash of the text."""
        return f"{self.name}@{digest(self.template, length=8)}"

    def ask(self, **texts: str) -> tuple[Message, ...]:
        """Render the judge's prompt: one user turn. What is judged is fenced, and its fences are defused."""
        pieces = {name: defuse(text) for name, text in texts.items()}
        # one pass over the template: text that looks like a placeholder is not filled in
        content = re.sub(r"\{\{(\w+)\}\}", lambda match: pieces[match[1]], self.template)
        return ({"role": "user", "content": content},)


def defuse(text: str, tags: re.Pattern[str] = _TAGS) -> str:
    """Make delimiters inside judged text harmless, visibly: </response> becomes ‹/response›."""
    return tags.sub(r"‹\1\2›", text.strip())


def load_rubric(
    name: str, *, justified: bool | None, kind: str = "", asks_with: Sequence[str] = ("prompt", "response")
) -> Rubric:
    """Load a template by name or path; `justified` chooses its format line (None: it needs none).

    `kind` begins the name of the format line's file, `asks_with` are the placeholders that the template must have.
    Raises ConfigError where there is no such template, or it lacks a placeholder.
    """
    path = RUBRICS / f"{name}.txt"
    if not path.exists():
        path = Path(name).expanduser()
    if not path.is_file():
        known = sorted(rubric.stem for rubric in RUBRICS.glob("*.txt") if not rubric.stem.startswith("format_"))
        raise ConfigError(f"judgments.rubric: expected one of {known} or the path of a text file, got {name!r}.")
    template = path.read_text(encoding="utf-8").strip()
    if justified is not None:
        form = (RUBRICS / f"format_{kind}{'justified' if justified else 'score'}.txt").read_text(encoding="utf-8")
        template = template.replace("{{format}}", form.strip())
        for placeholder in (f"{{{{{text}}}}}" for text in asks_with):
            if placeholder not in template:
                raise ConfigError(f"rubric {name!r}: expected the placeholder {placeholder}, it is not there.")
    return Rubric(path.stem, template)


def loops_rubric(config: JudgmentsConfig) -> Rubric:
    """Load what the loop's judge is asked with, of a whole response or of a step."""
    if config.steps is None:
        return load_rubric(config.rubric, justified=config.justified)
    return load_rubric("step", justified=config.justified, asks_with=("prompt", "before", "step"))


def texts(config: RunConfig) -> list[str]:
    """Identify the template that the loop's judge is shown and, where it is shown steps, what their scores come to."""
    how = config.judgments
    steps = [f"{how.steps} of at most {reasoning.MOST} steps"] if how.steps else []
    return [loops_rubric(how).identity, *steps]


class Task(NamedTuple):
    """One response to be judged."""

    target_id: str
    prompt_id: str
    prompt: str
    response: str


def tasks(prompts: pa.Table, responses: Iterable[Mapping[str, Any]]) -> list[Task]:
    """Join responses to their prompts; responses of one prompt stay together, so the judge reads it once."""
    asked = {row["prompt_id"]: schemas.conversation(row["messages"]) for row in prompts.to_pylist()}
    return [Task(row["response_id"], row["prompt_id"], asked[row["prompt_id"]], row["response"]) for row in responses]


class _Pass(NamedTuple):
    """One judgment before it becomes a row."""

    number: int
    text: str
    verdict: Verdict
    finish_reason: str
    seed: int


def judge(
    work: Sequence[Task],
    engine: Engine,
    config: JudgmentsConfig,
    *,
    iteration: int,
    judge_name: str,
    seed: int,
    first: int = 0,
) -> tuple[pa.Table, pa.Table]:
    """Judge each response in passes first .. k - 1; rows JUDGMENTS in task order, and DROPS.

    All passes of a response are one request, so its prompt is computed once. Pass i draws from the same stream
    whether it is asked for at first or added later by a higher k. With `config.steps` there is one request a step of
    the response, and a pass over all of them is one row.
    """
    rubric = loops_rubric(config)
    how = Sampling(config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens)
    asked = {
        task.target_id: [
            Request(
                ".".join((task.target_id, *place)),
                messages=messages,
                sampling=how,
                n=config.k - first,
                seed=seed_for(seed, iteration, "judgments", task.target_id, judge_name, *place) + first,
            )
            for place, messages in _questions(task, rubric, config)
        ]
        for task in work
    }
    read = {"text": _read_text, "guided": _read_guided, "expected": _read_expected}[config.reading]
    passes: dict[str, list[_Pass]] = defaultdict(list)
    for name, made in read([request for of in asked.values() for request in of], engine, config):
        passes[name].append(made._replace(number=made.number + first))
    rows: list[dict[str, object]] = []
    drops: list[dict[str, object]] = []
    for task in work:
        said = [sorted(passes[request.id]) for request in asked[task.target_id]]
        if not all(said):
            row = {"id": task.target_id, "stage": "judgments", "reason": "judge_prompt_too_long"}
            detail = None if config.steps is None else f"step {said.index([]) + 1} of {len(said)}"
            drops.append({**row, "iteration": iteration, "detail": detail})
            continue
        for of_one_pass in zip(*said, strict=True):
            made = of_one_pass[0] if config.steps is None else _joined(of_one_pass, config.steps)
            rows.append(_row(task, made, config.reading, rubric.identity, judge_name, iteration))
    return schemas.table(rows, schemas.JUDGMENTS), schemas.table(drops, schemas.DROPS)


def _questions(
    task: Task, rubric: Rubric, config: JudgmentsConfig
) -> Iterator[tuple[tuple[str, ...], tuple[Message, ...]]]:
    """Yield what is asked about a response, and the place in it: one question, or one a step after those before it.

    The questions about one response are the same up to where the steps before end: an engine reads that once. What was
    said of those steps is not shown.
    """
    if config.steps is None:
        yield (), rubric.ask(prompt=task.prompt, response=task.response)
        return
    steps = reasoning.cut(task.response)
    for number, step in enumerate(steps, 1):
        shown = {"prompt": task.prompt, "before": "\n\n".join(steps[: number - 1]), "step": step}
        yield (str(number),), rubric.ask(**{name: defuse(text, _TAGS_OF_STEPS) for name, text in shown.items()})


def _joined(steps: Sequence[_Pass], how: reasoning.Together) -> _Pass:
    """Put one pass over the steps of a response together; one that cannot be read leaves the response without a score.

    The text keeps each step's judgment, and ends in their scores.
    """
    texts = [f"Step {number} of {len(steps)}:\n{one.text.strip()}" for number, one in enumerate(steps, 1)]
    scores = [one.verdict.value for one in steps]
    read = [score for score in scores if score is not None]
    if len(read) == len(steps):
        value = reasoning.together(read, how)
        verdict = Verdict(value, None)
    else:
        lost = scores.index(None)
        value, verdict = None, Verdict(None, f"{steps[lost].verdict.unreadable_reason}, step {lost + 1}")
    texts.append(f"{how} of {', '.join(map(_spelled, scores))}: {_spelled(value)}")
    cut = next((one.finish_reason for one in steps if one.finish_reason != "stop"), "stop")
    return steps[0]._replace(text="\n\n".join(texts), verdict=verdict, finish_reason=cut)


def _spelled(score: float | None) -> str:
    return "null" if score is None else f"{score:.4g}"


def _row(task: Task, made: _Pass, reading: str, rubric: str, judge_name: str, iteration: int) -> dict[str, object]:
    return {
        "judgment_id": digest(task.target_id, iteration, judge_name, made.number, reading, rubric, made.text),
        "target_id": task.target_id,
        "other_id": None,
        "first": None,
        "prompt_id": task.prompt_id,
        "iteration": iteration,
        "index": made.number,
        "form": "pointwise",
        "reading": reading,
        "judge": judge_name,
        "rubric": rubric,
        "text": made.text,
        "verdict": made.verdict.value,
        "unreadable_reason": made.verdict.unreadable_reason,
        "finish_reason": made.finish_reason,
        "seed": made.seed,
    }


_Read = Iterator[tuple[str, _Pass]]


def _read_text(requests: Sequence[Request], engine: Engine, config: JudgmentsConfig) -> _Read:
    """The paper's reading: the judge writes, and its last score line is read."""
    seeds = {request.id: request.seed for request in requests}
    for done in engine.generate(requests):
        if done.finish_reason != "too_long":
            verdict = parse_verdict(done.text, done.finish_reason)
            seed = seeds[done.request_id] + done.index
            yield done.request_id, _Pass(done.index, done.text, verdict, done.finish_reason, seed)


def _read_guided(requests: Sequence[Request], engine: Engine, config: JudgmentsConfig) -> _Read:
    """Justification written freely up to its budget, then one score token drawn from the six allowed."""
    for target_id, made, weights in _scored(requests, engine, config):
        if weights is None:
            yield target_id, made
            continue
        point = random.Random(made.seed).choices(POINTS, _tempered(weights, config.sampling.temperature))[0]
        text = f"{made.text}{SCORE_LINE}{point}"
        yield target_id, made._replace(text=text, verdict=Verdict(float(point), None))


def _read_expected(requests: Sequence[Request], engine: Engine, config: JudgmentsConfig) -> _Read:
    """The probability-weighted mean over the score tokens: sum of p(i) i over 0..5, renormalised; read_off."""
    for target_id, made, weights in _scored(requests, engine, config):
        if weights is None:
            yield target_id, made
            continue
        value = read_off(sum(weight * float(point) for weight, point in zip(weights, POINTS, strict=True)))
        spelled = " ".join(f"{point}:{weight:.3f}" for weight, point in zip(weights, POINTS, strict=True))
        yield target_id, made._replace(text=f"{made.text}{SCORE_LINE}{spelled}", verdict=Verdict(value, None))


def _scored(
    requests: Sequence[Request], engine: Engine, config: JudgmentsConfig
) -> Iterator[tuple[str, _Pass, list[float] | None]]:
    """Yield each pass with its justification and the probabilities of the six points, or null if they do not fit."""
    drafts: dict[tuple[str, int], Completion] = {}
    by_id = {request.id: request for request in requests}
    for draft in _justify(requests, engine, config):
        if draft.finish_reason == "failed":
            none = Verdict(None, why_not_whole("failed"))
            seed = by_id[draft.request_id].seed + draft.index
            yield draft.request_id, _Pass(draft.index, "", none, "failed", seed), None
        else:
            drafts[draft.request_id, draft.index] = draft
    scoring = [
        Request(f"{target_id}/{index}", messages=by_id[target_id].messages, prefix=f"{draft.text}{SCORE_LINE}")
        for (target_id, index), draft in drafts.items()
    ]
    for scores in engine.token_scores(scoring, POINTS):
        target_id, index = scores.request_id.rsplit("/", 1)
        draft = drafts[target_id, int(index)]
        why = "score_line_too_long" if scores.missing == "too_long" else "no_answer"
        made = _Pass(draft.index, draft.text, Verdict(None, why), draft.finish_reason,
                     by_id[target_id].seed + draft.index)  # fmt: skip
        yield target_id, made, None if scores.logprobs is None else normalise(scores.logprobs)


def _justify(requests: Sequence[Request], engine: Engine, config: JudgmentsConfig) -> Iterator[Completion]:
    """Write the justifications, each ending in a new line; empty ones where none is asked for."""
    if not config.justified:
        for request in requests:
            yield from (Completion(request.id, index, "", 0, "stop") for index in range(request.n))
        return
    stop = ("Score:", "score:", "SCORE:")
    writing = [replace(request, sampling=replace(request.sampling, stop=stop)) for request in requests]
    for draft in engine.generate(writing):
        if draft.finish_reason != "too_long":
            text = draft.text.strip().rstrip("*").rstrip()
            yield draft._replace(text=f"{text}\n" if text else "")


def normalise(logprobs: Sequence[float]) -> list[float]:
    """Turn natural-log probabilities into shares that sum to 1."""
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def read_off(value: float) -> float:
    """Round a verdict that was computed from probabilities to a ten-thousandth.

    Log-probabilities are float32 and differ in the last bits with whatever else is in the batch. Of responses that the
    judge gives the same score, one would be chosen over the other for the ninth digit.
    """
    return round(value, 4)


def _tempered(weights: Sequence[float], temperature: float) -> list[float]:
    top = max(weights)
    if temperature == 0:
        return [float(weight == top) for weight in weights]
    return [(weight / top) ** (1 / temperature) for weight in weights]


class Score(NamedTuple):
    """The score of one response: mean and population variance of its readable verdicts."""

    mean: float
    variance: float
    n: int


def scores(judgments: pa.Table, *, k: int, required: int) -> dict[str, Score]:
    """Average the readable verdicts of passes 0 .. k - 1, unrounded; a response with fewer than `required` has none.

    (4, 3.5, null) with 2 required is 3.75; (4, null, null) has no score.
    """
    verdicts: dict[str, list[float]] = defaultdict(list)
    for target, index, verdict in zip(
        judgments["target_id"].to_pylist(),
        judgments["index"].to_pylist(),
        judgments["verdict"].to_pylist(),
        strict=True,
    ):
        if verdict is not None and index < k:
            verdicts[target].append(verdict)
    result: dict[str, Score] = {}
    for target, values in verdicts.items():
        if len(values) >= required:
            mean = math.fsum(values) / len(values)
            result[target] = Score(mean, math.fsum((value - mean) ** 2 for value in values) / len(values), len(values))
    return result
