"""An engine whose children answer who they are, a batch of max_sequences every few milliseconds. No model."""

import os
import queue
import threading
import time

import msgspec

from srlm_core.config import EngineConfig
from srlm_core.engines.child import channel_to_parent
from srlm_core.engines.local import LocalEngine
from srlm_core.engines.messages import Chosen, Completed, Draw, Forget, FromParent, Ready, Refused, Start, Weighed
from srlm_core.engines.protocol import Completion, LogProb, TokenScores


class EchoEngine(LocalEngine):
    kind, module = "echo", "engines.echo"


def answers(word):
    key, name = word.key, str(os.getpid())
    if not isinstance(word, Draw):
        if hasattr(word, "row"):
            return [Weighed(key, LogProb(word.row.id, -1.0, 1, False))]
        return [Chosen(key, TokenScores(word.request.id, (0.0,) * len(word.choices)))]
    if word.request.prefix == "fail":
        return [Refused(key, "as asked")]
    if word.request.prefix == "die":
        os._exit(3)
    return [Completed(key, Completion(word.request.id, i, name, 1, "stop")) for i in range(word.request.n)]


def main():
    channel = channel_to_parent()
    words = iter(channel)
    start = msgspec.msgpack.decode(next(words), type=Start)
    batch = EngineConfig.model_validate_json(start.config).max_sequences
    channel.send(msgspec.msgpack.encode(Ready(100)))
    inbox = queue.SimpleQueue()

    def read():
        for word in words:
            inbox.put(msgspec.msgpack.decode(word, type=FromParent))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        taken = [inbox.get()]
        time.sleep(0.005)
        while len(taken) < batch and not inbox.empty():
            taken.append(inbox.get())
        for word in taken:
            for answer in [] if isinstance(word, Forget) else answers(word):
                channel.send(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
