"""The scripted engine as replicas, in processes of their own: what shows that where they run changes no row."""

from pathlib import Path

import msgspec

from srlm_core.config import EngineConfig
from srlm_core.engines import messages
from srlm_core.engines.child import Channel, channel_to_parent
from srlm_core.engines.local import LocalEngine
from srlm_core.engines.messages import Answer, Forget, FromParent, Question, Ready, Refused, Start
from srlm_core.engines.scripted import ScriptedEngine
from srlm_core.errors import ModelError


class ScriptedReplicas(LocalEngine):
    """The parent's side."""

    kind = "scripted"
    module = "srlm_core.engines.scripted_replicas"
    capabilities = ScriptedEngine.capabilities


def answers(engine: ScriptedEngine, asked: Question) -> list[Answer]:
    """Answer one question."""
    if isinstance(asked, messages.Draw):
        return [messages.Completed(asked.key, done) for done in engine.generate([asked.request])]
    if isinstance(asked, messages.Weigh):
        return [messages.Weighed(asked.key, done) for done in engine.logprobs([asked.row])]
    if isinstance(asked, messages.Appraise):
        return [messages.Appraised(asked.key, done) for done in engine.rewards([asked.row])]
    return [messages.Chosen(asked.key, done) for done in engine.token_scores([asked.request], asked.choices)]


def main() -> None:
    """Be the child."""
    channel = channel_to_parent()
    words = iter(channel)
    start = msgspec.msgpack.decode(next(words), type=Start)
    try:
        engine = ScriptedEngine(EngineConfig.model_validate_json(start.config), Path(start.model))
    except ModelError as error:
        _send(channel, Refused(None, str(error)))
        return
    _send(channel, Ready(engine.context))
    decode = msgspec.msgpack.Decoder(FromParent).decode
    for word in words:
        asked = decode(word)
        if not isinstance(asked, Forget | Start):
            for answer in answers(engine, asked):
                _send(channel, answer)


def _send(channel: Channel, word: Ready | Refused | Answer) -> None:
    channel.send(msgspec.msgpack.encode(word))


if __name__ == "__main__":
    main()
