"""CREAM's scores: log-probabilities of responses by the engine that is open, against a bare batched forward."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks.sides import Comparison, in_turn, stopwatch
from benchmarks.workload import engine, small_model
from srlm_core import data, logprobs, schemas
from srlm_core.engines import open_engine


class Size(NamedTuple):
    prompts: int
    n: int
    batch: int
    """Rows of a bare forward."""


SIZES = {"cpu": Size(16, 5, 16), "gpu": Size(2_000, 5, 64)}


def compare(size: Size, rounds: int) -> list[Comparison]:
    """Score the same responses with both; both models are loaded before, other responses for every round."""
    made = Comparison(
        f"log-probabilities of {size.prompts} x {size.n} responses", "the stage, on the engine",
        "a bare batched forward", "tokens/s", "at least", 0.9,
    )  # fmt: skip
    bare = _Bare(small_model(), size.batch)
    told: dict[int, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_engine(engine(), small_model(), log=Path(folder) / "log") as opened,
    ):

        def ours(r: int) -> float:
            prompts, responses = rows(size, r)
            with stopwatch() as seconds:
                scored, _ = logprobs.score(prompts, responses, opened, iteration=1, model="M1")
                took = seconds()
            told[r] = logprobs.known(scored)
            return bare.count(prompts, responses) / took

        def theirs(r: int) -> float:
            prompts, responses = rows(size, r)
            with stopwatch() as seconds:
                values = bare.score(prompts, responses)
                took = seconds()
            apart = max(abs(values[name] - told[r][name]) for name in values)
            made.also.setdefault("largest difference of a response, nats", []).append(round(apart, 6))
            return bare.count(prompts, responses) / took

        in_turn(ours, [(made, theirs)], rounds, ours_first=True)
    return [made]


def rows(size: Size, r: int) -> tuple[pa.Table, pa.Table]:
    """Lay out shipped prompts, each with responses that were written to others: their texts do not matter."""
    shipped = data.load(data.SEED / "instructions.jsonl", "examples").rows
    rng = random.Random(r)
    prompts = [
        {"prompt_id": f"{r}-{i}", "iteration": 1, "source": "seed", "generator": "",
         "messages": [{"role": "user", "content": row["instruction"]}]}
        for i, row in enumerate(rng.sample(shipped, size.prompts))
    ]  # fmt: skip
    responses = [
        {"response_id": f"{prompt['prompt_id']}-{n}", "prompt_id": prompt["prompt_id"], "iteration": 1, "index": n,
         "response": rng.choice(shipped)["response"], "n_tokens": 0, "finish_reason": "stop", "source": "policy",
         "model": "M1", "seed": 0}
        for prompt in prompts
        for n in range(size.n)
    ]  # fmt: skip
    return schemas.table(prompts, schemas.PROMPTS), schemas.table(responses, schemas.RESPONSES)


class _Bare:
    """The model as transformers loads it: rows sorted by length, padded, one forward a batch."""

    def __init__(self, path: Path, batch: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch, self.batch = torch, batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if self.device == "cuda" else "float32"
        )
        self.model.to(self.device).eval()

    def count(self, prompts: pa.Table, responses: pa.Table) -> int:
        """Count the tokens of all rows, prompts included, as the bare forward computes them."""
        return sum(len(ids) for _, ids, _ in self._tokens(prompts, responses))

    def score(self, prompts: pa.Table, responses: pa.Table) -> dict[str, float]:
        """Return response id to the log-probability of its tokens, the end of the turn included."""
        found = sorted(self._tokens(prompts, responses), key=lambda row: -len(row[1]))
        values: dict[str, float] = {}
        for start in range(0, len(found), self.batch):
            values |= self._forward(found[start : start + self.batch])
        return values

    def _forward(self, rows: Sequence[tuple[str, list[int], int]]) -> dict[str, float]:
        torch = self.torch
        longest = max(len(ids) for _, ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, said = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (_, tokens, begins) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)], said[i, begins : len(tokens)] = 1, 1
        ids, mask, said = (each.to(self.device) for each in (ids, mask, said))
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * said[:, 1:]
        return dict(zip((name for name, _, _ in rows), chosen.sum(-1).tolist(), strict=True))

    def _tokens(self, prompts: pa.Table, responses: pa.Table) -> Iterator[tuple[str, list[int], int]]:
        asked = {row["prompt_id"]: row["messages"] for row in prompts.to_pylist()}
        for row in responses.to_pylist():
            begins = self.tokenizer.apply_chat_template(
                asked[row["prompt_id"]], tokenize=False, add_generation_prompt=True
            )
            before = self.tokenizer(begins, add_special_tokens=False)["input_ids"]
            after = self.tokenizer(row["response"] + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            yield row["response_id"], before + after, len(before)
