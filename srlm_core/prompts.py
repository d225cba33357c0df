"""prompts: the model writes new tasks from eight demonstrations (arXiv:2401.10020 section 2.2, arXiv:2212.10560).

What is kept is distinct from the seed instructions, from every prompt kept before, and from everything that measures.
Filtering goes in request order, never in arrival order, so the same completions give the same prompts.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa

from srlm_core import schemas
from srlm_core.config import PromptsConfig
from srlm_core.contamination import Watch
from srlm_core.engines.protocol import Completion, Engine, Message, Request, Sampling
from srlm_core.similarity import Similarity
from srlm_core.store import digest, seed_for

VERSION = 2

# Self-Instruct's list: what a text model cannot do or be shown
_FORBIDDEN = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)
_OPENING = "Come up with a series of tasks:\n"
_ITEM = re.compile(r"^\s*(\d+)\s*[.)]\s*")


def unusable(text: str, config: PromptsConfig) -> str | None:
    """Say why a prompt's form is refused, or None.

    Self-Instruct's rules, and one of ours against tasks that answer themselves.
    """
    n_words = len(text.split())
    if n_words < config.min_words:
        return "too_short"
    if n_words > config.max_words:
        return "too_many_words"
    if _FORBIDDEN.search(text):
        return "forbidden_word"
    if text.lower().startswith("write a program"):
        return "forbidden_form"
    if not (text[0].isascii() and text[0].isalnum()):
        return "forbidden_form"
    if re.search(r"(?i)\b(input|output|answer|response)\s*:", text) and "?" not in text:
        return "answered_itself"
    return None


def one_line(text: str) -> str:
    """Put a task on one line, as a numbered list needs it."""
    return re.sub(r"\s+", " ", text).strip().rstrip(":")


def demonstrations(
    seeds: Sequence[str], generated: Sequence[str], config: PromptsConfig, rng: random.Random
) -> list[str]:
    """Draw 6 seed and 2 generated prompts, shuffled; seeds stand in while too few are generated."""
    n_generated = min(config.generated_demonstrations, len(generated))
    n_seeds = config.seed_demonstrations + config.generated_demonstrations - n_generated
    chosen = rng.sample(list(seeds), min(n_seeds, len(seeds))) + rng.sample(list(generated), n_generated)
    rng.shuffle(chosen)
    return [one_line(text) for text in chosen]


def render(demos: Sequence[str], config: PromptsConfig, *, request_id: str, seed: int) -> Request:
    """Ask for the next tasks after the numbered demonstrations, as raw text or as a user's turn."""
    listed = "\n".join(f"{number}. {task}" for number, task in enumerate(demos, start=1))
    first = len(demos) + 1
    sampling = Sampling(
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        max_tokens=config.sampling.max_tokens * config.per_request,
        stop=("\n\n", f"\n{first + config.per_request}."),
    )
    if config.form == "completion":
        return Request(request_id, prefix=f"{_OPENING}{listed}\n{first}.", sampling=sampling, seed=seed)
    asked = (
        f"{_OPENING}{listed}\n\nContinue the list with task {first}"
        + (f" to {first + config.per_request - 1}" if config.per_request > 1 else "")
        + ". Write only the new tasks, numbered."
    )
    message: Message = {"role": "user", "content": asked}
    return Request(request_id, messages=(message,), prefix=f"{first}.", sampling=sampling, seed=seed)


def read_tasks(completion: Completion, config: PromptsConfig) -> list[str]:
    """Read the new tasks from one completion; an unfinished last one is left out."""
    tasks: list[str] = []
    for number, line in enumerate(completion.text.split("\n")):
        task = _ITEM.sub("", line).strip()
        if number == 0 or _ITEM.match(line):
            tasks.append(task)
        elif task and tasks:
            tasks[-1] = f"{tasks[-1]} {task}"
    if completion.finish_reason == "length":
        tasks = tasks[:-1]
    return [task for task in tasks if task][: config.per_request]


class Kept(NamedTuple):
    """What a new prompt must differ from, and where its demonstrations come from."""

    seeds: tuple[str, ...]
    """Seed instructions that may be shown."""
    generated: list[str]
    similarity: Similarity
    measuring: Watch

    @classmethod
    def start(
        cls, seeds: Sequence[str], measuring: Watch, threshold: float, *, shown: Sequence[str] | None = None
    ) -> "Kept":
        """Begin with the seed instructions, and the prompts that measure and must never be trained on.

        `shown` are the seeds that may be demonstrations; None for all.
        """
        kept = cls(tuple(seeds if shown is None else shown), [], Similarity(threshold), measuring)
        for text in seeds:
            kept.similarity.add(text, "similar_to_seed")
        return kept

    def too_near(self, text: str) -> str | None:
        """Say what a prompt is too near to, or None."""
        return "copy_of_evaluation" if self.measuring.copy_in(text) else self.similarity.nearest(text)

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Forget afterwards what was taken in meanwhile: a shard that is being made may be thrown away."""
        size, generated = len(self.similarity), len(self.generated)
        try:
            yield
        finally:
            self.similarity.forget(size)
            del self.generated[generated:]

    def add(self, text: str, *, generated: bool) -> None:
        """Take a prompt in."""
        self.similarity.add(text, "similar_to_kept")
        if generated:
            self.generated.append(text)


class _Shard(NamedTuple):
    iteration: int
    generator: str
    rows: list[dict[str, object]]
    drops: list[dict[str, object]]

    def keep(self, text: str, source: str) -> None:
        generator = self.generator if source == "self_instruct" else ""
        prompt_id = digest("prompt", self.iteration, source, generator, text)
        self.rows.append(
            {
                "prompt_id": prompt_id,
                "iteration": self.iteration,
                "messages": [{"role": "user", "content": text}],
                "source": source,
                "generator": generator,
            }
        )

    def drop(self, where: str, reason: str, text: str) -> None:
        row = {"id": digest("dropped prompt", self.iteration, where, text), "stage": "prompts", "reason": reason}
        self.drops.append({**row, "iteration": self.iteration, "detail": text[:300]})

    def tables(self) -> tuple[pa.Table, pa.Table]:
        return schemas.table(self.rows, schemas.PROMPTS), schemas.table(self.drops, schemas.DROPS)


def given(texts: Sequence[str], *, iteration: int, source: str) -> tuple[pa.Table, pa.Table]:
    """Lay out different prompts that are to be used as they are, in order; rows PROMPTS and DROPS."""
    shard = _Shard(iteration, "", [], [])
    for text in texts:
        shard.keep(text, source)
    return shard.tables()


def take(
    texts: Sequence[str], kept: Kept, *, iteration: int, source: str, wanted: int | None = None
) -> tuple[pa.Table, pa.Table]:
    """Take prompts of a user's dataset, in order, through the same similarity filter; rows PROMPTS and DROPS."""
    shard = _Shard(iteration, "", [], [])
    for number, text in enumerate(texts):
        reason = kept.too_near(text)
        if reason:
            shard.drop(f"{source} {number}", reason, text)
        elif wanted is None or len(shard.rows) < wanted:
            kept.add(text, generated=False)
            shard.keep(text, source)
    return shard.tables()


def write(
    engine: Engine,
    kept: Kept,
    config: PromptsConfig,
    *,
    wanted: int,
    iteration: int,
    shard: int,
    generator: str,
    seed: int,
) -> tuple[pa.Table, pa.Table]:
    """Have the engine write `wanted` new prompts, or as many as the limit of attempts allows; rows PROMPTS and DROPS.

    `kept` grows by what is kept. Asks in rounds, each a little larger than what is missing at the yield so far.
    """
    made = _Shard(iteration, generator, [], [])
    attempts, limit = 0, math.ceil(config.max_attempts * wanted)
    while len(made.rows) < wanted and attempts < limit:
        missing = wanted - len(made.rows)
        yield_so_far = max(len(made.rows) / attempts, 0.2) if attempts else 0.7
        tasks = min(math.ceil(missing / yield_so_far), limit - attempts)
        requests = [
            _request(kept, config, iteration, shard, attempts + number, seed)
            for number in range(0, tasks, config.per_request)
        ]
        done = {completion.request_id: completion for completion in engine.generate(requests)}
        for request in requests:
            _sift(done[request.id], made, kept, config, wanted)
        attempts += len(requests) * config.per_request
    return made.tables()


def _request(kept: Kept, config: PromptsConfig, iteration: int, shard: int, number: int, seed: int) -> Request:
    where = (seed, iteration, "prompts", shard, number)
    demos = demonstrations(kept.seeds, kept.generated, config, random.Random(seed_for(*where, "demonstrations")))
    return render(demos, config, request_id=f"{iteration}-{shard}-{number}", seed=seed_for(*where))


def _sift(completion: Completion, made: _Shard, kept: Kept, config: PromptsConfig, wanted: int) -> None:
    tasks = read_tasks(completion, config)
    if not tasks:
        made.drop(
            completion.request_id, "unfinished" if completion.finish_reason != "stop" else "empty", completion.text
        )
    for number, task in enumerate(tasks):
        reason = unusable(task, config) or kept.too_near(task)
        if reason is None and len(made.rows) >= wanted:
            reason = "over_target"
        if reason:
            made.drop(f"{completion.request_id}-{number}", reason, task)
        else:
            kept.add(task, generated=True)
            made.keep(task, "self_instruct")


def why_dropped(drops: pa.Table) -> Counter[str]:
    """Count drops by reason."""
    return Counter(drops["reason"].to_pylist())
