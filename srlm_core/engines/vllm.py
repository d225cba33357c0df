"""The vLLM engine: the default on GPUs and on processors. Its child runs vLLM's engine loop in one process."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srlm_core.config import EngineConfig
from srlm_core.engines import hardware
from srlm_core.engines.hardware import Placement
from srlm_core.engines.local import LocalEngine
from srlm_core.engines.messages import Answer, Chosen, Completed, Start, Weighed
from srlm_core.engines.protocol import Completion, LogProb, Sampling, TokenScores
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.serving import Appraisal, Assess, Continue, LanguageTask, Task, serve

_GIB = 2**30
EXTRA = "srlm_draw"
"""Where a request carries what engines/nucleus.py draws by; vLLM then takes the request for a greedy one."""


class VllmEngine(LocalEngine):
    """The parent's side."""

    kind = "vllm"
    module = "srlm_core.engines.vllm"

    def environment(self, place: Placement) -> Mapping[str, str]:
        quiet = {
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        if place.on_gpu:
            return quiet | place.visible() | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        # One process, not three: each that vLLM would spawn imports it anew, ten seconds on a small machine. It then
        # sets no OpenMP threads of its own, so we do.
        return quiet | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | hardware.openmp(place)


class VllmRunner:
    """The child's side. Each sample is a vLLM request of its own, so that it is handed out when it is done."""

    def __init__(self, start: Start, config: EngineConfig, renderer: Renderer, context: int) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if not start.gpu:
            from srlm_core.engines import vllm_head  # noqa: F401 - its layer takes the place of vLLM's

        self._ends, self._nucleus = sorted(renderer.ends), not start.gpu
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments(start, config, context)))
        self._tasks: dict[str, tuple[LanguageTask, int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def add(self, task: Task) -> None:
        if isinstance(task, Continue):
            for index in range(task.request.n):
                self._add(task, index, task.prompt, self._sampling(task, index))
        elif isinstance(task, Assess):
            self._add(task, 0, task.prompt + task.tokens, _one_token(prompt_logprobs=0))
        elif not isinstance(task, Appraisal):  # the parent asks a language model for no reward
            self._add(task, 0, task.prompt, _one_token(logprob_token_ids=task.tokens))

    def step(self) -> list[Answer]:
        finished = [output for output in self._engine.step() if output.finished and output.request_id in self._tasks]
        return [self._answer(*self._tasks.pop(output.request_id), output) for output in finished]

    def forget(self, keys: frozenset[int]) -> None:
        dropped = [name for name, (task, _) in self._tasks.items() if task.key in keys]
        self._engine.abort_request(dropped)
        for name in dropped:
            del self._tasks[name]

    def _add(self, task: LanguageTask, index: int, ids: list[int], sampling: Any) -> None:
        from vllm.inputs.engine import tokens_input

        name = f"{task.key}.{index}"
        self._tasks[name] = task, index
        self._engine.add_request(name, tokens_input(ids), sampling)

    def _sampling(self, task: Continue, index: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = task.request.sampling
        return SamplingParams(
            max_tokens=asked.max_tokens, stop=list(asked.stop), stop_token_ids=self._ends,
            output_kind=RequestOutputKind.FINAL_ONLY, **drawing(asked, task.request.seed + index, self._nucleus),
        )  # fmt: skip

    def _answer(self, task: LanguageTask, index: int, output: Any) -> Answer:
        if isinstance(task, Continue):
            done = output.outputs[0]
            reason = "length" if done.finish_reason == "length" else "stop"
            return Completed(task.key, Completion(task.request.id, index, done.text, len(done.token_ids), reason))
        if isinstance(task, Assess):
            positions = output.prompt_logprobs[len(task.prompt) :]
            said = [position[token] for position, token in zip(positions, task.tokens, strict=True)]
            total, greedy = sum(token.logprob for token in said), all(token.rank == 1 for token in said)
            return Weighed(task.key, LogProb(task.id, total, len(said), greedy))
        scores = output.outputs[0].logprobs[0]
        return Chosen(task.key, TokenScores(task.id, tuple(scores[token].logprob for token in task.tokens)))


def drawing(asked: Sampling, seed: int, nucleus: bool) -> dict[str, Any]:
    """Return how vLLM is to draw: where `nucleus` says so and there is one, by engines/nucleus.py."""
    if not asked.temperature:
        return {"temperature": 0}
    if nucleus and asked.top_p < 1:
        by = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": seed}
        return {"temperature": 0, "extra_args": {EXTRA: by}}
    return {"temperature": asked.temperature, "top_p": asked.top_p, "seed": seed}


def _one_token(**asked: Any) -> Any:
    """Draw one token and throw it away: what is wanted are log-probabilities, at temperature 1."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **asked
    )


def arguments(start: Start, config: EngineConfig, context: int) -> dict[str, Any]:
    """Return the settings of vLLM's engine."""
    shared = {
        "model": start.model, "dtype": config.dtype, "max_model_len": context, "max_num_seqs": config.max_sequences,
        "enforce_eager": not config.compiled, "enable_prefix_caching": True, "disable_log_stats": True,
        "trust_remote_code": start.trust_remote_code, "seed": 0, "generation_config": "vllm",
        "hf_overrides": {"head_dtype": "float32"} if has_plain_head(Path(start.model)) else {},
    }  # fmt: skip
    if start.gpu:
        return shared | {"tensor_parallel_size": config.tensor_parallel, "gpu_memory_utilization": config.gpu_memory}
    assert config.kv_cache_gib, "open_engine fills it in"
    # A prompt split by chunked prefill ends vLLM's CPU backend when its request has a seed
    whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 2048)}
    # Prompts share whole blocks only. vLLM's 128 shares 128 of a rubric's 160 tokens and none of the request behind it;
    # 32 shares nearly all: 1.6 times the judgments a second. The backend wants multiples of 32
    blocks = {"kv_cache_memory_bytes": int(config.kv_cache_gib * _GIB), "block_size": 32}
    ours = ["srlm_core.engines.nucleus:NucleusProcessor", "srlm_core.engines.vllm_head:Asked"]
    return shared | whole_prompts | blocks | {"logits_processors": ours, "distributed_executor_backend": "uni"}


def has_plain_head(model: Path) -> bool:
    """Whether the head's weights are numbers as they are: vLLM computes no other head in float32 (exact_head.py)."""
    return "quantization_config" not in json.loads((model / "config.json").read_text())


if __name__ == "__main__":
    serve(VllmRunner)
