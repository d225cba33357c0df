"""The transformers engine's child: one running batch that sequences leave when they end and join as places free up.

Rows are padded on the left, so that the next position is the same column for all. Each sequence draws from a random
stream of its own: what else is in the batch does not change its draws.

Only this child imports the module: it pays for torch and transformers at the top.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

if __name__ == "__main__":
    # transformers imports what it finds and decoding never calls: seconds of start-up
    sys.modules.update(dict.fromkeys(("sklearn", "scipy", "vllm", "triton"), None))  # type: ignore[arg-type]

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from srlm_core.config import EngineConfig
from srlm_core.engines.exact_head import exact
from srlm_core.engines.messages import Answer, Chosen, Completed, Start, Weighed
from srlm_core.engines.nucleus import draw, uniform
from srlm_core.engines.protocol import Completion, FinishReason, LogProb, TokenScores
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.serving import Appraisal, Assess, Compare, Continue, Task, serve

PREFILL_TOKENS = 4096
"""Tokens of one forward pass over prompts, padding included; one longer prompt goes alone."""
SCORED_POSITIONS = 1024
"""Rows of logits held at once while responses are weighed."""
_SLAB = 64


class SlabLayer(DynamicLayer):
    """Keys and values in memory that grows by slabs: the stock layer copies the whole cache for each token."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append along the positions, dimension 2 of 4; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self._room = (key_states, value_states)
            return self.keys, self.values
        old, new = self.keys.shape[2], key_states.shape[2]
        if self._room[0].shape[2] < old + new or self._room[0].shape[0] != self.keys.shape[0]:
            self._room = (_roomier(self.keys, new), _roomier(self.values, new))
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, old : old + new] = states
        self.keys, self.values = (room[:, :, : old + new] for room in self._room)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these instead."""
        self.keys, self.values = keys, values
        self._room = (keys, values)


def _roomier(states: torch.Tensor, more: int) -> torch.Tensor:
    batch, heads, length, size = states.shape
    room = states.new_empty(batch, heads, length + more + _SLAB, size)
    room[:, :, :length] = states
    return room


class Sample:
    """One sample on its way."""

    def __init__(self, task: Continue, index: int) -> None:
        self.task, self.index = task, index
        self.said: list[int] = []
        self.tail = max(map(len, task.request.sampling.stop), default=0) + 8
        """Tokens in which a stop string that the newest one completes must lie; a token may be part of a character."""


class Batch:
    """Sequences that are decoded together, their cache, and which of its positions are padding."""

    def __init__(self, rows: list[Sample], cache: Cache, mask: torch.Tensor, last: torch.Tensor) -> None:
        self.rows, self.cache, self.mask, self.last = rows, cache, mask, last

    def keep(self, places: Sequence[int]) -> None:
        """Drop all other rows, and the columns that are padding in all that stay."""
        if len(places) == len(self.rows):
            return
        chosen = torch.tensor(places, dtype=torch.long, device=self.mask.device)
        self.rows, self.mask, self.last = [self.rows[i] for i in places], self.mask[chosen], self.last[chosen]
        start = int(self.mask.any(0).int().argmax()) if places else 0
        self.mask = self.mask[:, start:]
        for layer in _layers(self.cache):
            layer.replace(layer.keys[chosen, :, start:], layer.values[chosen, :, start:])

    def join(self, other: "Batch") -> None:
        """Take the rows of another batch in; the shorter one is padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.rows = self.rows + other.rows
        self.mask = torch.cat([_left(batch.mask, width, 1) for batch in (self, other)])
        self.last = torch.cat([self.last, other.last])
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            mine.replace(*(
                torch.cat([_left(states, width, 2) for states in pair])
                for pair in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            ))  # fmt: skip


def _layers(cache: Cache) -> list[SlabLayer]:
    return cast("list[SlabLayer]", cache.layers)


def _left(states: torch.Tensor, width: int, dimension: int) -> torch.Tensor:
    """Pad with zeros at the beginning of a dimension."""
    shape = list(states.shape)
    shape[dimension] = width - shape[dimension]
    return torch.cat([states.new_zeros(shape), states], dimension) if shape[dimension] else states


class Decoder:
    """Runs a causal language model on whatever device torch finds."""

    def __init__(self, start: Start, config: EngineConfig, renderer: Renderer, context: int) -> None:
        self.device = "cuda" if start.gpu else "mps" if torch.backends.mps.is_available() else "cpu"
        torch.set_num_threads(start.threads)
        torch.set_grad_enabled(False)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            start.model, dtype=getattr(torch, config.dtype), trust_remote_code=start.trust_remote_code
        )
        self.model.to(self.device).eval()
        assert config.max_sequences, "open_engine fills it in"
        self.renderer, self.places = renderer, config.max_sequences
        self.ends = renderer.ends
        self.new: deque[Sample] = deque()
        self.questions: deque[Assess | Compare] = deque()
        self.batch: Batch | None = None

    @property
    def busy(self) -> bool:
        return bool(self.new or self.questions or self.batch)

    def add(self, task: Task) -> None:
        if isinstance(task, Continue):
            self.new.extend(Sample(task, index) for index in range(task.request.n))
        elif not isinstance(task, Appraisal):  # the parent asks a language model for no reward
            self.questions.append(task)

    def forget(self, keys: frozenset[int]) -> None:
        self.new = deque(row for row in self.new if row.task.key not in keys)
        self.questions = deque(question for question in self.questions if question.key not in keys)
        if self.batch is not None:
            self._keep([i for i, row in enumerate(self.batch.rows) if row.task.key not in keys])

    def step(self) -> list[Answer]:
        if self.questions:
            return self._score()
        running = len(self.batch.rows) if self.batch else 0
        # A join copies the cache, so it waits until an eighth of the places is free
        if self.new and (not running or self.places - running >= max(1, self.places // 8)):
            return self._admit(self.places - running)
        return self._advance()

    # ------------------------------------------------------------------------------------------------- sampling

    def _admit(self, places: int) -> list[Answer]:
        """Read prompts, each distinct one once, and draw the first token of their sequences."""
        rows = [self.new.popleft() for _ in range(min(places, len(self.new)))]
        done: list[Answer] = []
        for group in _alike(rows):
            prompts = {row.task.key: row.task.prompt for row in group}
            place = {key: i for i, key in enumerate(prompts)}
            cache = Cache(layer_class_to_replicate=SlabLayer)
            logits, mask = self._read(list(prompts.values()), 1, cache)
            copies = torch.tensor([place[row.task.key] for row in group], device=self.device)
            for layer in _layers(cache):
                layer.replace(layer.keys[copies], layer.values[copies])
            fresh = Batch(group, cache, mask[copies], torch.empty(0))
            done += self._take(fresh, logits[:, -1][copies])
            if not fresh.rows:
                continue
            if self.batch is None:
                self.batch = fresh
            else:
                self.batch.join(fresh)
        return done

    def _advance(self) -> list[Answer]:
        """Decode one token of every running sequence."""
        batch = self.batch
        if batch is None:
            return []
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], 1)
        output = self.model(
            input_ids=batch.last[:, None], attention_mask=batch.mask, position_ids=batch.mask.sum(1, keepdim=True) - 1,
            past_key_values=batch.cache, use_cache=True,
        )  # fmt: skip
        done = self._take(batch, output.logits[:, -1])
        if not batch.rows:
            self.batch = None
        return done

    def _take(self, batch: Batch, logits: torch.Tensor) -> list[Answer]:
        """Draw the next token of every row; rows that end leave the batch."""
        batch.last = self._draw(batch.rows, logits.float())
        done: list[Answer] = []
        stay = []
        for place, (row, token) in enumerate(zip(batch.rows, batch.last.tolist(), strict=True)):
            row.said.append(token)
            if (reason := self._ended(row, token)) is None:
                stay.append(place)
            else:
                done.append(self._completed(row, reason))
        batch.keep(stay)
        return done

    def _draw(self, rows: list[Sample], logits: torch.Tensor) -> torch.Tensor:
        asked = [row.task.request.sampling for row in rows]
        temperature = torch.tensor([sampling.temperature for sampling in asked], device=self.device)
        greedy = logits.argmax(-1)
        if not bool(temperature.any()):
            return greedy
        numbers = [uniform(row.task.request.seed + row.index, len(row.said)) for row in rows]
        top_p = torch.tensor([sampling.top_p for sampling in asked], device=self.device)
        drawn = draw(
            logits, temperature.masked_fill(temperature == 0, 1), top_p, torch.tensor(numbers, device=self.device)
        )
        return torch.where(temperature == 0, greedy, drawn)

    def _ended(self, row: Sample, token: int) -> FinishReason | None:
        sampling = row.task.request.sampling
        if token in self.ends:
            return "stop"
        if sampling.stop and any(stop in self.renderer.decode(row.said[-row.tail :]) for stop in sampling.stop):
            return "stop"
        return "length" if len(row.said) >= sampling.max_tokens else None

    def _completed(self, row: Sample, reason: FinishReason) -> Completed:
        request = row.task.request
        text = self.renderer.continuation(row.task.prompt, row.said)
        cut = min((at for stop in request.sampling.stop if (at := text.find(stop)) >= 0), default=len(text))
        return Completed(row.task.key, Completion(request.id, row.index, text[:cut], len(row.said), reason))

    def _keep(self, places: list[int]) -> None:
        assert self.batch is not None
        self.batch.keep(places)
        if not self.batch.rows:
            self.batch = None

    # -------------------------------------------------------------------------------------------------- scoring

    def _score(self) -> list[Answer]:
        """Weigh as many of the waiting questions as one forward pass takes."""
        taken: list[Assess | Compare] = []
        positions = width = 0
        while self.questions:
            question = self.questions[0]
            length = len(question.prompt) + (len(question.tokens) if isinstance(question, Assess) else 0)
            positions = max(positions, len(question.tokens) if isinstance(question, Assess) else 1)
            width = max(width, length)
            count = len(taken) + 1
            if taken and (
                type(question) is not type(taken[0])
                or count * width > PREFILL_TOKENS
                or count * positions > SCORED_POSITIONS
            ):
                break
            taken.append(self.questions.popleft())
        with exact(self.model.get_output_embeddings()):
            return self._weighed(taken)

    def _weighed(self, taken: list[Assess | Compare]) -> list[Answer]:
        """Weigh questions of one kind in one forward pass."""
        if isinstance(taken[0], Assess):
            return [
                _weighed(task, logits)
                for task, logits in self._logits([task for task in taken if isinstance(task, Assess)])
            ]
        logits, _ = self._read([task.prompt for task in taken], 1, None)
        scores = logits[:, -1].float().log_softmax(-1).cpu()
        return [
            Chosen(task.key, TokenScores(task.id, tuple(row[task.tokens].tolist())))
            for task, row in zip(taken, scores, strict=True)
        ]

    def _logits(self, tasks: list[Assess]) -> Iterator[tuple[Assess, torch.Tensor]]:
        """Yield each task with the logits that foretell its tokens, shape (tokens, vocabulary)."""
        positions = max(len(task.tokens) for task in tasks) + 1
        logits, _ = self._read([task.prompt + task.tokens for task in tasks], positions, None)
        for task, row in zip(tasks, logits, strict=True):
            yield task, row[-len(task.tokens) - 1 : -1]

    def _read(self, prompts: list[list[int]], positions: int, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run prompts through the model; returns the logits of their last positions, and what is not padding."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
            use_cache=cache is not None, logits_to_keep=positions,
        )  # fmt: skip
        return output.logits, mask


def _weighed(task: Assess, logits: torch.Tensor) -> Weighed:
    tokens = torch.tensor(task.tokens, device=logits.device)
    said = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).sum()
    return Weighed(task.key, LogProb(task.id, said.item(), len(task.tokens), bool((logits.argmax(-1) == tokens).all())))


def _alike(rows: list[Sample]) -> Iterator[list[Sample]]:
    """Split into groups of like prompt length, so that little is padding and one forward pass is not too large."""
    group: list[Sample] = []
    keys: set[int] = set()
    for row in sorted(rows, key=lambda row: (len(row.task.prompt), row.task.key)):
        keys.add(row.task.key)
        if group and len(keys) * len(row.task.prompt) > PREFILL_TOKENS:
            yield group
            group, keys = [], {row.task.key}
        group.append(row)
    if group:
        yield group


if __name__ == "__main__":
    serve(Decoder)
