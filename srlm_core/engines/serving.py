"""An engine in a child process, seen from inside: questions come in, a runner batches them, answers go out."""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from srlm_core.config import EngineConfig
from srlm_core.engines.child import Channel, channel_to_parent
from srlm_core.engines.messages import (
    Answer,
    Appraise,
    Appraised,
    Chosen,
    Completed,
    Draw,
    Forget,
    FromParent,
    Question,
    Ready,
    Refused,
    Start,
    Weigh,
    Weighed,
)
from srlm_core.engines.protocol import Completion, LogProb, Request, Reward, TokenScores
from srlm_core.engines.rendering import Renderer, context_of
from srlm_core.errors import ModelError


class Continue(NamedTuple):
    """Sample n continuations of a prompt; answered by n Completed, in any order."""

    key: int
    request: Request
    prompt: list[int]


class Assess(NamedTuple):
    """Weigh the tokens that follow a prompt; answered by one Weighed."""

    key: int
    id: str
    prompt: list[int]
    tokens: list[int]


class Compare(NamedTuple):
    """Weigh tokens against one another at the position after a prompt; answered by one Chosen."""

    key: int
    id: str
    prompt: list[int]
    tokens: list[int]


class Appraisal(NamedTuple):
    """Reward a prompt and its response; answered by one Appraised."""

    key: int
    id: str
    prompt: list[int]
    """Both, as one text."""


LanguageTask = Continue | Assess | Compare
"""What a language model is asked; a reward model is asked for appraisals alone."""
Task = LanguageTask | Appraisal


class Runner(Protocol):
    """What runs the model. Only the serving thread calls it."""

    def add(self, task: Task) -> None:
        """Take a task into the batch; it fits the context."""
        ...

    def step(self) -> Iterable[Answer]:
        """Compute a little and return what became ready."""
        ...

    def forget(self, keys: frozenset[int]) -> None:
        """Stop working on these."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        ...


def serve(make: Callable[[Start, EngineConfig, Renderer, int], Runner]) -> None:
    """Be the child: load the model, then answer until the parent is gone.

    `make` gets what the parent said, the config, the renderer, and the longest prompt plus completion in tokens.
    """
    channel = channel_to_parent()
    words = iter(channel)
    start = msgspec.msgpack.decode(next(words), type=Start)
    try:
        config = EngineConfig.model_validate_json(start.config)
        renderer = Renderer(Path(start.model), trust_remote_code=start.trust_remote_code)
        context = min(config.context, context_of(Path(start.model)) or config.context)
        runner = make(start, config, renderer, context)
    except ModelError as error:
        _send(channel, Refused(None, str(error)))
        return
    _send(channel, Ready(context))
    inbox: queue.SimpleQueue[Task | Forget | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, words, renderer, context, inbox), daemon=True).start()
    _work(channel, runner, inbox)


def _work(channel: Channel, runner: Runner, inbox: queue.SimpleQueue[Task | Forget | None]) -> None:
    while True:
        while not runner.busy or not inbox.empty():
            word = inbox.get()
            if word is None:
                sys.stderr.flush()
                os._exit(0)  # engines leave threads and atexit hooks that hang; the memory goes with the process
            if isinstance(word, Forget):
                runner.forget(frozenset(word.keys))
            else:
                runner.add(word)
        for answer in runner.step():
            _send(channel, answer)


def _read(
    channel: Channel,
    words: Iterable[bytes],
    renderer: Renderer,
    context: int,
    inbox: queue.SimpleQueue[Task | Forget | None],
) -> None:
    """Tokenize in a thread of its own, so that the model never waits for it."""
    decode = msgspec.msgpack.Decoder(FromParent).decode
    try:
        for word in words:
            question = decode(word)
            if isinstance(question, Forget):
                inbox.put(question)
                continue
            assert isinstance(question, Question)
            task = _task(question, renderer, channel)
            if task is not None and fits(task, context):
                inbox.put(task)
            elif task is not None:
                for answer in refusals(task):
                    _send(channel, answer)
    finally:  # whatever ends the reading ends the engine: a parent must not wait for one that hears nothing
        inbox.put(None)


def _task(question: Question, renderer: Renderer, channel: Channel) -> Task | None:
    """Make a task of a question, or refuse it: one must not end the others, and chat templates raise what they like."""
    try:
        task = as_task(question, renderer)
        if not task.prompt:
            raise ModelError(
                f"expected a prompt of at least one token, got none: {question}. Give messages or a prefix."
            )
        return task
    except Exception as error:
        told = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        _send(channel, Refused(question.key, told))
        return None


def as_task(question: Question, renderer: Renderer) -> Task:
    """Render and tokenize what is asked. Raises ModelError where the tokenizer cannot."""
    if isinstance(question, Draw):
        return Continue(
            question.key, question.request, renderer.prompt(question.request.messages, question.request.prefix)
        )
    if isinstance(question, Weigh):
        row = question.row
        asked = renderer.scored(row.messages, row.response) if row.messages else renderer.raw(row.prefix, row.response)
        return Assess(question.key, row.id, *asked)
    if isinstance(question, Appraise):
        row = question.row
        return Appraisal(question.key, row.id, renderer.whole(row.messages, row.response))
    asked = renderer.choices(question.request.messages, question.request.prefix, question.choices)
    return Compare(question.key, question.request.id, *asked)


def fits(task: Task, context: int) -> bool:
    """Whether prompt and completion, or prompt, response and one more token, fit the context."""
    if isinstance(task, Continue):
        return len(task.prompt) + task.request.sampling.max_tokens <= context
    if isinstance(task, Appraisal):
        return len(task.prompt) <= context
    return len(task.prompt) + (len(task.tokens) if isinstance(task, Assess) else 0) + 1 <= context


def refusals(task: Task) -> Sequence[Answer]:
    """Say of each thing asked that it is too long."""
    if isinstance(task, Continue):
        request = task.request
        return [Completed(task.key, Completion(request.id, i, "", 0, "too_long")) for i in range(request.n)]
    if isinstance(task, Assess):
        return [Weighed(task.key, LogProb(task.id, None, len(task.tokens), False))]
    if isinstance(task, Appraisal):
        return [Appraised(task.key, Reward(task.id, None, len(task.prompt)))]
    return [Chosen(task.key, TokenScores(task.id, None))]


def _send(channel: Channel, word: Ready | Refused | Answer) -> None:
    channel.send(msgspec.msgpack.encode(word))
