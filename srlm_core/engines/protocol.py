"""The protocol every engine speaks: generate, logprobs, token_scores; and rewards, where the model is a reward model.

An engine yields results as they finish, in any order; each carries the id of what asked for it. Several threads
may call one engine at once, and it batches over all of them. What does not fit the context is refused, never cut.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self, TypedDict

Missing = Literal["too_long", "failed", "no_choice"]
"""Why there is no answer. `too_long`: refused, the prompt does not fit the context; `failed`: an endpoint gave nothing
that can be used, however often it was asked; `no_choice`: none of the choices is among what it says of the next token.
"""
FinishReason = Literal["stop", "length", "too_long", "failed", "no_choice"]
"""`stop`: the model ended; `length`: cut at max_tokens; the others: there is no text, see Missing."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw text."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Strings that end a completion; not part of its text."""


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to continue.

    With messages, they go through the model's own chat template and `prefix` begins the assistant's turn.
    Without messages, `prefix` is raw text.
    Sample i of n draws from the stream `seed + i`, so seeds of different requests lie at least n apart.
    """

    id: str
    messages: tuple[Message, ...] = ()
    prefix: str = ""
    sampling: Sampling = Sampling()
    n: int = 1
    seed: int = 0


class Completion(NamedTuple):
    """Sample `index` of a request; `text` excludes the request's prefix and the stop string."""

    request_id: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - nobody asks a completion for tuple.index
    text: str
    n_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A response whose probability under the model is asked: messages end with the user's turn.

    Without messages, it continues the raw text `prefix`, and no end of a turn is weighed.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    prefix: str = ""


class LogProb(NamedTuple):
    """Sum of log p(response token | what came before), natural log, end-of-turn token included; null if too long."""

    id: str
    logprob: float | None
    n_tokens: int
    greedy: bool
    """Whether greedy decoding would have said exactly this response."""


class Reward(NamedTuple):
    """What a reward model gives a response: a number without a unit, of which only differences mean something.

    Null if prompt and response are too long.
    """

    id: str
    reward: float | None
    n_tokens: int
    """Of prompt and response."""


class TokenScores(NamedTuple):
    """Natural-log probabilities of the choices at the next position, in the choices' order; null: see `missing`.

    Not normalised over the choices: what they leave of 1 is the mass on everything else.
    """

    request_id: str
    logprobs: tuple[float, ...] | None
    missing: Missing = "too_long"
    """Why, where there are none."""


class Engine(Protocol):
    """A loaded model. A context manager: leaving it gives the memory back."""

    @property
    def kind(self) -> str: ...

    @property
    def context(self) -> int:
        """Longest prompt plus completion, in tokens."""
        ...

    @property
    def capabilities(self) -> frozenset[str]:
        """Which of `generate`, `logprobs`, `token_scores`, `rewards` it can do.

        A language model gives no rewards, a reward model nothing else, and an endpoint may lack some.
        """
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield n completions a request, as they finish."""
        ...

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        """Yield the log-probability of each response."""
        ...

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        """Yield the probabilities of the choices as the next token after each request; `sampling` and `n` are unused.

        Each choice must be one token after the prefix; raises ModelError where the tokenizer splits one.
        """
        ...

    def rewards(self, rows: Iterable[ScoredText]) -> Iterator[Reward]:
        """Yield the reward of each response; raises ModelError where the model is no reward model."""
        ...
