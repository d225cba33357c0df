"""A small OpenAI-compatible server that judges as a test tells it to; also badly."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[str], Any]
"""From what is asked to what is answered: text, {token: log-probability}, or (status, body)."""


class Annotator:
    """Serves while it is entered; `asked` are the prompts that came."""

    def __init__(self, say: Say) -> None:
        self.say, self.asked, self.lock = say, [], threading.Lock()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Yield the endpoint's name, as srlm's settings take it."""
        handler = type("Handler", (_Handler,), {"annotator": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"gpt@http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    annotator: Annotator
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": "gpt", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        if text != "Say one digit.":
            with self.annotator.lock:
                self.annotator.asked.append(text)
        said = {"1": -0.1} if text == "Say one digit." else self.annotator.say(text)
        if isinstance(said, tuple):
            return self.send(*said)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
        if isinstance(said, dict):
            top = [
                {"token": token, "logprob": value, "bytes": None, "top_logprobs": []} for token, value in said.items()
            ]
            choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        else:
            choice["message"]["content"] = said.removesuffix("…")
            choice["finish_reason"] = "length" if said.endswith("…") else "stop"
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        told = {"id": "1", "object": "chat.completion", "created": 0, "model": "gpt"}
        return self.send(200, {**told, "choices": [choice], "usage": usage})

    def send(self, status: int, body: Any):
        text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass
