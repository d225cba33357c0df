"""The engine without a model: the real protocol, deterministic, in milliseconds.

A scripted model is a folder with one number, its skill in [0, 1]. Skill decides how good its answers are and how
sharply it judges; training raises it by construction. It proves the loop, it proves nothing about language models.
"""

import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq

from srlm_core.config import EngineConfig
from srlm_core.engines.protocol import Completion, LogProb, Request, Reward, ScoredText, TokenScores
from srlm_core.engines.training_job import TrainingJob, TrainingResult
from srlm_core.errors import ModelError
from srlm_core.store import seed_for, write_json

_VERBS = [
    "Explain", "Describe", "Compare", "List", "Summarise", "Plan", "Rewrite", "Estimate", "Outline", "Suggest",
    "Recommend", "Draft", "Review", "Teach",
]  # fmt: skip
_THINGS = [
    "the tides", "a bakery", "winter gardening", "a train timetable", "compound interest", "a school play",
    "bird migration", "a job interview", "healthy breakfasts", "an old bicycle", "volcanoes", "a chess opening",
    "moving house", "solar panels", "a family budget", "sourdough bread", "the water cycle", "a thank-you note",
    "first aid", "a museum visit", "honey bees", "a street market", "long-distance running", "knitting",
    "the night sky", "a lost parcel", "rain barrels", "a choir",
]  # fmt: skip
_FOR = [
    "for a ten-year-old", "in three steps", "for a busy parent", "with one example", "for a beginner",
    "in plain words", "for a small village", "before Monday", "without any jargon", "for two people",
    "on a tight budget", "as a short letter", "for a grandparent", "with a checklist", "in under fifty words",
    "for a rainy day",
]  # fmt: skip
_SOUND = [
    "Sound: this settles what was asked.", "Sound: the numbers add up.", "Sound: the steps are in order.",
    "Sound: an example makes it plain.", "Sound: nothing is left out.",
]  # fmt: skip
_HOLLOW = [
    "Hollow: many things could be said here.", "Hollow: it depends on many factors.",
    "Hollow: opinions differ widely.", "Hollow: this is an interesting topic.", "Hollow: more research may help.",
]  # fmt: skip
_JUDGED = re.compile(r"<(?:response|step)>\n(.*?)\n</(?:response|step)>", re.DOTALL)
_JUDGMENT = re.compile(r"<judgment>\n.*?(?:Score: (\d))?\n</judgment>", re.DOTALL)


def base_model(folder: Path, skill: float = 0.2) -> Path:
    """Make the scripted M0 where there is none."""
    if not (folder / "scripted.json").exists():
        write_json(folder / "scripted.json", {"skill": skill, "lineage": []})
    return folder


def skill_of(model: Path) -> float:
    """Read a scripted model. Raises ModelError where the folder holds none."""
    try:
        return float(json.loads((model / "scripted.json").read_text())["skill"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"expected a scripted model (scripted.json with a skill) in {model}, got: {error}. "
            "The scripted engine runs no real model: set engine.kind to auto, vllm or transformers for one."
        ) from error


class ScriptedEngine:
    """Answers, writes prompts and judges by rule, from the request's seed alone."""

    kind = "scripted"
    capabilities = frozenset({"generate", "logprobs", "token_scores", "rewards"})

    def __init__(self, config: EngineConfig, model: Path) -> None:
        self.context = config.context
        self.skill = skill_of(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            for index in range(request.n):
                yield self._complete(request, index)

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        for row in rows:
            n_tokens, noise = len(row.response.split()) + 1, random.Random(seed_for("p", row.response, self.skill))
            liked = (0.5 + self.skill / 2) * quality(row.response) / 5  # the better it is, the more sound points count
            yield LogProb(row.id, -n_tokens * (2 - liked) + noise.gauss(0, 0.5), n_tokens, False)

    def rewards(self, rows: Iterable[ScoredText]) -> Iterator[Reward]:
        for row in rows:
            noise = random.Random(seed_for("reward", row.response, self.skill)).gauss(0, 1.2 - self.skill)
            yield Reward(row.id, quality(row.response) - 2.5 + noise, _n_words(row.response))

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        for request in requests:
            asked = _asked(request)
            rng = random.Random(seed_for("scores", asked, request.prefix, self.skill))
            seen = [quality(text) + rng.gauss(0, 1.2 - self.skill) for text in _JUDGED.findall(asked)]
            if _JUDGMENT.search(asked):
                logits = self._nearness(asked, rng)
            elif len(seen) == 2:
                logits = [seen[0], seen[1]]
            else:
                logits = [-abs((seen[0] if seen else 2.5) - float(choice)) for choice in choices]
            norm = math.log(sum(math.exp(value) for value in logits))
            yield TokenScores(request.id, tuple(value - norm for value in logits))

    def _complete(self, request: Request, index: int) -> Completion:
        asked = _asked(request)
        if _n_words(asked + request.prefix) + request.sampling.max_tokens > self.context:
            return Completion(request.id, index, "", 0, "too_long")
        rng = random.Random(seed_for("complete", asked, request.prefix, request.seed + index, self.skill))
        if "series of tasks" in (asked or request.prefix) or asked.startswith("Write another request"):
            text, done = _task(rng), True
        elif asked.startswith("Grade a response"):
            text, done = self._judgment(asked, rng), rng.random() > 0.04
        elif _JUDGMENT.search(asked):
            a, b = self._nearness(asked, rng)
            text, done = f"One is nearer.\nWinner: Judgment {'A' if a > b else 'B'}", rng.random() > 0.04
        elif "Better: A or Better: B" in asked:
            text, done = self._preference(asked, rng), rng.random() > 0.04
        elif "[[" in asked:
            text, done = self._verdict(asked, rng), rng.random() > 0.04
        else:
            text, done = self._answer(rng), rng.random() > 0.03
        if request.sampling.stop[:1] == ("Better:",):
            text = text.partition("Better:")[0]
        return Completion(request.id, index, text, _n_words(text), "stop" if done else "length")

    def _answer(self, rng: random.Random) -> str:
        sound = sum(rng.random() < self.skill for _ in range(5))
        sentences = rng.sample(_SOUND, sound) + rng.sample(_HOLLOW, rng.randint(1, 3))
        rng.shuffle(sentences)
        return " ".join(sentences)

    def _judgment(self, asked: str, rng: random.Random) -> str:
        if rng.random() < 0.05:
            return "It is hard to say anything about this response."
        found = _JUDGED.findall(asked)
        seen = quality(found[-1]) if found else 2.5
        score = min(5, max(0, round(seen + rng.gauss(0, 1.2 - self.skill))))
        like = f"{rng.choice(_THINGS)} {rng.choice(_FOR)}"  # two judgments are hardly ever the same words
        return f"The response makes {seen:.0f} sound points, as one on {like}.\nScore: {score}"

    def _nearness(self, asked: str, rng: random.Random) -> list[float]:
        """Judge two judgments by how near their scores are to what it sees itself; the first one has an advantage."""
        seen = quality(_JUDGED.findall(asked)[0]) + rng.gauss(0, 1.2 - self.skill)
        near = [-abs(float(score or 2.5) - seen) for score in _JUDGMENT.findall(asked)]
        return [near[0] + 0.3, near[1]]

    def _preference(self, asked: str, rng: random.Random) -> str:
        """Say which of two responses is better, now and then both or neither."""
        a, b = (quality(text) + rng.gauss(0, 1.2 - self.skill) for text in _JUDGED.findall(asked))
        better = "A" if a > b else "B"
        said = f"One makes more sound points, as one on {rng.choice(_THINGS)}."
        odd = rng.random()
        return said if odd < 0.04 else f"{said}\nBetter: {better}" + (" or Better: B" if odd > 0.96 else "")

    def _verdict(self, asked: str, rng: random.Random) -> str:
        """Judge as the published benchmarks ask: a grade, or one of five verdicts, in double brackets."""
        if rng.random() < 0.05:
            return "It is hard to say anything about this."
        seen = [quality(text) + rng.gauss(0, 1.2 - self.skill) for text in _JUDGED.findall(asked)]
        if "[[A>B]]" not in asked:
            return f"The answer is plain.\n[[{min(10, max(1, round(2 * seen[-1])))}]]"
        lead = seen[0] - seen[1]
        place = sum(lead > step for step in (-2, -0.5, 0.5, 2))
        return ("[[B>>A]]", "[[B>A]]", "[[A=B]]", "[[A>B]]", "[[A>>B]]")[place]


def quality(text: str) -> float:
    """Return the true quality of a scripted response, 0 to 5: its sound sentences."""
    return float(min(5, text.count("Sound:")))


def _asked(request: Request) -> str:
    return request.messages[-1]["content"] if request.messages else ""


def _n_words(text: str) -> int:
    return len(text.split())


def _task(rng: random.Random) -> str:
    return f" {rng.choice(_VERBS)} {rng.choice(_THINGS)} {rng.choice(_FOR)}, {rng.choice(_FOR)}."


def train(
    job: TrainingJob, *, log: Path, on_progress: Callable[[dict[str, Any]], None] | None = None
) -> TrainingResult:
    """Make the next scripted model: skill closes a sixth of its distance to 1, if there was anything to learn from."""
    started = time.monotonic()
    n_rows = pq.read_metadata(job.rows).num_rows
    before = skill_of(job.init_from)
    skill = before + (1 - before) / 6 * min(1, n_rows / 8)
    steps = math.ceil(n_rows / job.settings.batch_size)
    history: list[dict[str, Any]] = [
        {"step": step, "loss": math.log(2) / (1 + step / max(steps, 1)), "learning_rate": job.settings.learning_rate}
        for step in range(1, steps + 1)
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"scripted {job.kind}: {n_rows} rows, skill {before:.3f} to {skill:.3f}\n")
    aside = job.output.with_name(f".{job.output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    write_json(aside / "scripted.json", {"skill": skill, "lineage": [*_lineage(job.init_from), job.kind]})
    shutil.rmtree(job.output, ignore_errors=True)
    aside.rename(job.output)
    if on_progress:
        on_progress(
            {"event": "step", "step": steps, "total_steps": steps, "loss": history[-1]["loss"] if history else None}
        )
    return TrainingResult(
        log=tuple(history),
        steps=steps,
        epochs=job.settings.epochs,
        n_rows=n_rows,
        n_heldout=0,
        dropped=(),
        seconds=time.monotonic() - started,
        resumed_from_step=None,
        memory_mib=0.0,
        gpu_memory_mib=None,
        best_step=steps,
        precision="float32",
    )


def _lineage(model: Path) -> list[str]:
    return list(json.loads((model / "scripted.json").read_text()).get("lineage", []))
