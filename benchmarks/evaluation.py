"""A whole evaluation of one model, against one bare `vllm.LLM` that is given the same requests list after list."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.bare import Asked, Bare
from benchmarks.sampling import Recorder
from benchmarks.sides import Comparison, in_turn, say, stopwatch
from benchmarks.workload import engine, small_model
from srlm_core import data, loop
from srlm_core.backend import make_backend, resolve
from srlm_core.config import RunConfig
from srlm_core.engines.protocol import Completion, Request, TokenScores
from srlm_core.executor import PlainExecutor
from srlm_core.run import Run
from srlm_core.store import Campaign


class Size(NamedTuple):
    prompts: int
    alpaca_eval: int
    groups: int
    ifeval: int
    tokens: int
    sequences: int


SIZES = {"cpu": Size(60, 200, 100, 100, 128, 64), "gpu": Size(60, 200, 100, 100, 1024, 256)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Evaluate the model in a new folder each round; the engine's start is left out of both, and counted."""
    with tempfile.TemporaryDirectory() as folder:
        return [_compare(size, rounds, Path(folder))]


def _compare(size: Size, rounds: int, folder: Path) -> Comparison:
    config, model = _config(size, folder), small_model()
    backend = make_backend(config, cache=model.parent, logs=folder)
    made = Comparison(
        f"evaluation: {size.prompts} + {size.alpaca_eval} prompts, {size.groups} groups, {size.ifeval} of IFEval",
        "srlm evaluate", "one bare vllm.LLM, list after list", "tokens/s", "at least", 0.95,
    )  # fmt: skip
    tokens: list[int] = []
    with backend.open(backend.base()) as started, Bare(config.engine, model) as bare, PlainExecutor(29) as executor:
        recorder = Started(started)

        def ours(r: int) -> float:
            recorder.calls.clear()
            with Campaign(folder, f"round {r}") as campaign, stopwatch() as seconds:
                campaign.logs.mkdir()
                run = Run(config, campaign, executor, backend._replace(open=lambda _: recorder))
                loop.evaluate_one(run, run.base)
                took = seconds()
            tokens.append(sum(used["tokens"] for used in run.usage.values()))
            say(json.dumps(run.usage))
            return tokens[-1] / took

        def theirs(r: int) -> float:
            done = [bare.ask(asked) for asked in recorder.calls]
            return sum(one.tokens for one in done) / sum(one.seconds for one in done)

        in_turn(ours, [(made, theirs)], rounds, ours_first=True)  # what it asks for, the other side is given
    made.also = {"tokens, ours": tokens, "engine starts in each evaluation": recorder.starts / rounds}
    return made


def _config(size: Size, folder: Path) -> RunConfig:
    """Make every file of the shipped corpus: each text measures once, and what is left would train."""
    rows = data.load(data.SEED / "instructions.jsonl", "examples").rows
    groups = [row for name in ("ranked", "heldout") for row in data.load(data.SEED / f"{name}.jsonl", "groups").rows]
    number = count()
    asked = [(f"{row['instruction']} ({next(number)})", row["response"]) for row in rows]
    first, second = size.alpaca_eval, size.alpaca_eval + size.ifeval

    def lines(name: str, content: Sequence[dict[str, Any]]) -> str:
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in content))
        return str(folder / name)

    no_commas = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return resolve(RunConfig.model_validate({
        "engine": engine(max_sequences=size.sequences, shard_rows=16).model_dump(),
        "seed_data": {
            "ift": lines("ift.jsonl", [{"instruction": text, "response": said} for text, said in asked[second:]]),
            "eft": lines("eft.jsonl", groups[size.groups :]), "eft_targets": "ranked", "eft_form": "score",
            "heldout": lines("heldout.jsonl", groups[: size.groups]),
        },
        "judgments": {"reading": "expected", "justified": False, "k": 1, "sampling": {"max_tokens": size.tokens}},
        "responses": {"sampling": {"max_tokens": size.tokens}},
        "evaluation": {
            "prompts": size.prompts, "attacks": False, "text_judgments": 40, "sampling": {"max_tokens": size.tokens},
            "suites": {
                "alpaca_eval": lines("a.jsonl", [{"instruction": t, "output": said} for t, said in asked[:first]]),
                "ifeval": lines("i.jsonl", [{"prompt": text, **no_commas} for text, _ in asked[first:second]]),
                "sampling": {"max_tokens": size.tokens, "top_p": 0.9},
            },
        },
    }))  # fmt: skip


class Started(Recorder):
    """The project's engine, open already: counts how often it would have been started, and keeps what it is asked."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.calls, self.starts = list[Asked](), 0

    def __enter__(self) -> Self:
        self.starts += 1
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        asked = list(requests)
        self.calls.append(Asked(asked))
        return self.engine.generate(asked)

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        asked = list(requests)
        self.calls.append(Asked(asked, choices=list(choices)))
        return self.engine.token_scores(asked, choices)
