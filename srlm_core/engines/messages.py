"""What parent and child of an engine say to each other, as msgpack frames over a channel (engines/child.py)."""

import msgspec

from srlm_core.engines.protocol import Completion, LogProb, Request, Reward, ScoredText, TokenScores


class Start(msgspec.Struct, tag=True):
    """First word of the parent."""

    config: str
    """EngineConfig as JSON, its kind and dtype resolved."""
    model: str
    trust_remote_code: bool
    threads: int
    gpu: bool


class Draw(msgspec.Struct, tag=True):
    """Ask for a request's completions; answered by n Completed."""

    key: int
    request: Request


class Weigh(msgspec.Struct, tag=True):
    """Ask for a response's log-probability; answered by one Weighed."""

    key: int
    row: ScoredText


class Choose(msgspec.Struct, tag=True):
    """Ask for the probabilities of choices; answered by one Chosen."""

    key: int
    request: Request
    choices: tuple[str, ...]


class Appraise(msgspec.Struct, tag=True):
    """Ask for a response's reward; answered by one Appraised."""

    key: int
    row: ScoredText


class Forget(msgspec.Struct, tag=True):
    """Nobody waits for these any more."""

    keys: tuple[int, ...]


class Ready(msgspec.Struct, tag=True):
    """First word of the child: it can be asked."""

    context: int


class Completed(msgspec.Struct, tag=True):
    """Answer to Draw."""

    key: int
    result: Completion


class Weighed(msgspec.Struct, tag=True):
    """Answer to Weigh."""

    key: int
    result: LogProb


class Chosen(msgspec.Struct, tag=True):
    """Answer to Choose."""

    key: int
    result: TokenScores


class Appraised(msgspec.Struct, tag=True):
    """Answer to Appraise."""

    key: int
    result: Reward


class Refused(msgspec.Struct, tag=True):
    """A ModelError in the child: at the start (null key), or about one request."""

    key: int | None
    message: str


Question = Draw | Weigh | Choose | Appraise
Answer = Completed | Weighed | Chosen | Appraised
FromParent = Start | Draw | Weigh | Choose | Appraise | Forget
FromChild = Ready | Completed | Weighed | Chosen | Appraised | Refused
