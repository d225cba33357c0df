"""The other side: one bare `vllm.LLM` in a process of its own, which answers one list of requests at a time."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec

from benchmarks.sides import stopwatch
from srlm_core.config import EngineConfig
from srlm_core.engines.messages import Start
from srlm_core.engines.protocol import Completion, LogProb, Request, ScoredText, TokenScores
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.vllm import VllmEngine, arguments, drawing


class Asked(msgspec.Struct):
    """What the parent sends, as a line of JSON."""

    requests: list[Request]
    nucleus: str = "ours"
    """`ours`, `vllm` or `none`."""
    ends: bool = True
    """Stop where the model or the request says so, and not at max_tokens alone."""
    fresh: bool = False
    """Forget first what prompts were seen before."""
    choices: list[str] = []
    """Weigh these at the next position, instead of generating."""


class Answered(msgspec.Struct):
    """What the child sends back."""

    seconds: float = 0.0
    completions: list[Completion] = []
    scores: list[TokenScores] = []

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return sum(completion.n_tokens for completion in self.completions)


class Bare:
    """The parent's side, speaking the engine protocol: each call is one `LLM.generate`, from its start to its end.

    The engine's settings, threads and sampler are those of the project's own engine.
    """

    kind, capabilities = "vllm", frozenset({"generate", "token_scores"})

    def __init__(self, config: EngineConfig, model: Path) -> None:
        self.config, self.model, self.context = config, model, config.context
        self.engine = VllmEngine(config, model, log=Path(os.devnull))

    def __enter__(self) -> Self:
        (place,) = self.engine.site.places
        environment, start = {**os.environ, **self.engine.environment(place)}, self.engine.start(place)
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare", msgspec.json.encode(start).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
        )  # fmt: skip
        self._read()
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.kill()
        self._child.wait()
        self._log.close()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        yield from self.ask(Asked(list(requests))).completions

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        yield from self.ask(Asked(list(requests), choices=list(choices))).scores

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        raise NotImplementedError("no stage of the benchmarks asks for it, and `capabilities` says so")

    def ask(self, asked: Asked) -> Answered:
        """Send a list of requests and wait for all of it."""
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode(asked) + b"\n")
        self._child.stdin.flush()
        return self._read()

    def _read(self) -> Answered:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(b"@"):
                return msgspec.json.decode(line[1:], type=Answered)
        raise SystemExit(f"the bare engine ended:\n{Path(self._log.name).read_text()[-3000:]}")


def main() -> None:
    """Be the child."""
    from vllm import LLM

    start = msgspec.json.decode(sys.argv[1], type=Start)
    config = EngineConfig.model_validate_json(start.config)
    llm, renderer = LLM(**arguments(start, config, config.context)), Renderer(Path(start.model))
    _send(Answered())
    for line in sys.stdin.buffer:
        asked = msgspec.json.decode(line, type=Asked)
        if asked.fresh:
            llm.reset_prefix_cache()
        with stopwatch() as seconds:
            answered = _score(llm, renderer, asked) if asked.choices else _generate(llm, renderer, asked)
            answered.seconds = seconds()
        _send(answered)


def _send(answered: Answered) -> None:
    sys.stdout.buffer.write(b"@" + msgspec.json.encode(answered) + b"\n")
    sys.stdout.buffer.flush()


def _generate(llm: Any, renderer: Renderer, asked: Asked) -> Answered:
    # One sample a request, as vLLM itself would divide `n`: a greedy request may not ask for more
    each = [(request, index) for request in asked.requests for index in range(request.n)]
    rendered = {request.id: renderer.prompt(request.messages, request.prefix) for request in asked.requests}
    prompts = [{"prompt_token_ids": rendered[request.id]} for request, _ in each]
    sampling = [_sampling(request, index, asked, renderer) for request, index in each]
    samples = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
    return Answered(completions=[
        Completion(request.id, index, sample.text, len(sample.token_ids), sample.finish_reason or "stop")
        for (request, index), sample in zip(each, samples, strict=True)
    ])  # fmt: skip


def _score(llm: Any, renderer: Renderer, asked: Asked) -> Answered:
    from vllm import SamplingParams

    chosen = [renderer.choices(request.messages, request.prefix, asked.choices) for request in asked.requests]
    sampling = [
        SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=its.tokens) for its in chosen
    ]
    done = llm.generate([{"prompt_token_ids": its.prompt} for its in chosen], sampling, use_tqdm=False)
    return Answered(scores=[
        TokenScores(request.id, tuple(output.outputs[0].logprobs[0][token].logprob for token in its.tokens))
        for request, its, output in zip(asked.requests, chosen, done, strict=True)
    ])  # fmt: skip


def _sampling(request: Request, index: int, asked: Asked, renderer: Renderer) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    drawn = replace(request.sampling, top_p=1.0) if asked.nucleus == "none" else request.sampling
    return SamplingParams(
        max_tokens=drawn.max_tokens, stop=list(drawn.stop), stop_token_ids=sorted(renderer.ends),
        ignore_eos=not asked.ends, min_tokens=0 if asked.ends else drawn.max_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY, **drawing(drawn, request.seed + index, asked.nucleus == "ours"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
