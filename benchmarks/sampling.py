"""Sampling and judging: the loop against one bare `vllm.LLM` that is given the same requests, stage after stage."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.bare import Asked, Bare
from benchmarks.sides import Comparison, arithmetic, in_turn, say, stopwatch
from benchmarks.workload import engine, instructions, small_model
from srlm_core import store
from srlm_core.backend import make_backend, resolve
from srlm_core.config import RunConfig
from srlm_core.engines.models import describe
from srlm_core.engines.protocol import Completion, Engine, Request
from srlm_core.executor import PlainExecutor
from srlm_core.run import Run
from srlm_core.shards import make_datasets
from srlm_core.store import Campaign


class Size(NamedTuple):
    prompts: int
    n: int
    k: int
    response_tokens: int
    judgment_tokens: int
    shard_rows: int
    sequences: int


SIZES = {"cpu": Size(24, 4, 3, 96, 64, 4, 64), "gpu": Size(1024, 4, 3, 256, 256, 64, 512)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Let the loop make an iteration's responses and judgments, and the bare engine answer the same requests."""
    with tempfile.TemporaryDirectory() as folder:
        return [_compare(size, rounds, Path(folder))]


def _compare(size: Size, rounds: int, folder: Path) -> Comparison:
    config, model = _config(size, rounds, folder), small_model()
    backend = make_backend(config, cache=model.parent, logs=folder)
    made = Comparison(
        f"sampling and judging: {size.prompts} prompts x {size.n} responses x {size.k} judgments",
        "the loop", "one bare vllm.LLM, stage after stage", "s", "at most", 1.0,
    )  # fmt: skip
    seen: dict[int, list[Request]] = {}
    tokens: list[int] = []
    with (
        Campaign(folder, "sampling") as campaign, PlainExecutor(29) as executor, Bare(config.engine, model) as bare,
    ):  # fmt: skip
        with backend.open(backend.base()) as engine:  # started once, for all rounds
            recorder = Recorder(engine)
            untrained = backend._replace(open=lambda _: recorder, frozen=lambda _: backend.base())  # M1 is M0 here
            run = Run(config, campaign, executor, untrained)
            campaign.logs.mkdir()

            def ours(r: int) -> float:
                recorder.seen.clear()
                with stopwatch() as seconds:
                    make_datasets(run, r + 1, run.base)
                    took = seconds()
                seen[r] = list(recorder.seen)
                return took

            def theirs(r: int) -> float:
                stages = [[request for request in seen[r] if request.n == n] for n in (size.n, size.k)]
                done = [bare.ask(Asked(stage)) for stage in stages]
                tokens.append(sum(stage.tokens for stage in done))
                return sum(stage.seconds for stage in done)

            in_turn(ours, [(made, theirs)], rounds, ours_first=True)  # what it asks for, the other side is given
        say(f"tokens: {tokens}; {json.dumps(run.usage)}")
    tokens_ours = [_generated(campaign, r + 1) for r in range(rounds)]
    if flops := arithmetic(size.sequences, config.engine.dtype):
        made.limit = 2 * describe(model).parameters * sum(tokens) / len(tokens) / flops
        made.limit_is = f"the products of the generated tokens alone, at {flops / 1e9:.0f} GFLOP/s"
    made.also = {"tokens generated, bare": tokens, "responses' tokens, ours": tokens_ours}
    return made


def _config(size: Size, rounds: int, folder: Path) -> RunConfig:
    file = folder / "prompts.txt"
    asked = [text.replace("\n", " ") for text in dict.fromkeys(instructions())]
    file.write_text("".join(f"{text}\n" for text in asked[: size.prompts * rounds]))
    return resolve(RunConfig.model_validate({
        "engine": engine(max_sequences=size.sequences, shard_rows=size.shard_rows).model_dump(),
        "seed_data": {"ift_rows": 1},
        "prompts": {"target": size.prompts, "file": str(file), "file_share": 1.0, "max_similarity": 1.0},
        "responses": {"n": size.n, "sampling": {"max_tokens": size.response_tokens}},
        "judgments": {"k": size.k, "sampling": {"max_tokens": size.judgment_tokens}},
        "evaluation": {"models": "none", "sampling": {"max_tokens": 64}},
    }))  # fmt: skip


def _generated(campaign: Campaign, t: int) -> int:
    return sum(row["n_tokens"] for row in store.iter_rows(campaign.iteration(t) / "responses"))


class Recorder:
    """The project's engine, remembering what it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.seen = engine, list[Request]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Stay open: the next round asks it, too."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        asked: Sequence[Request] = list(requests)
        self.seen += asked
        return self.engine.generate(asked)
