"""An endpoint as an engine, against a small server that speaks the protocol."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from srlm_core.config import EngineConfig
from srlm_core.engines import open_engine
from srlm_core.engines.openai import OpenAIEngine
from srlm_core.engines.protocol import Request, Sampling
from srlm_core.errors import ConfigError, EngineDied, ModelError

USER = ({"role": "user", "content": "Say something."},)


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the seed it was given; refuses the first request of each kind, as a busy server does."""

    protocol_version = "HTTP/1.1"
    seen: list[dict]
    busy: Counter
    logprobs = True
    lock = threading.Lock()

    def do_GET(self):
        self.say(200, {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append(asked | {"path": self.path, "key": self.headers["Authorization"]})
            self.busy[self.path] += 1
            first = self.busy[self.path] == 1
        if first:
            return self.say(429, {"error": {"message": "slow down"}}, {"retry-after-ms": "10"})
        if len(json.dumps(asked.get("messages") or asked.get("prompt"))) > 2000:
            return self.say(400, {"error": {"message": "This model's maximum context length is 512 tokens."}})
        chat = self.path.endswith("/chat/completions")
        if asked.get("logprobs") and not self.logprobs:
            return self.say(400, {"error": {"message": "logprobs are not supported"}})
        return self.say(200, self.chat(asked) if chat else self.raw(asked))

    def chat(self, asked: dict) -> dict:
        last = asked["messages"][-1]
        top = []
        if asked.get("logprobs"):
            after_space = last["role"] == "assistant" and last["content"].endswith(" ")
            words = {"3": -0.5, "4": -1.5, "x": -3.0} if after_space else {" ": -0.1, "the": -4.0}
            top = [
                {"token": word, "logprob": value, "bytes": None, "top_logprobs": []} for word, value in words.items()
            ]
        text = f"{'' if last['role'] == 'user' else last['content']} seed {asked.get('seed')}"
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if asked["max_tokens"] < 3 else "stop",
        }
        if top:
            choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}  # fmt: skip

    def raw(self, asked: dict) -> dict:
        choice = {"index": 0, "text": f" after {asked['prompt']}", "finish_reason": "stop", "logprobs": None}
        if asked.get("logprobs"):
            choice["logprobs"] = {
                "top_logprobs": [{" 1": -0.25, " 2": -2.0}],
                "tokens": [" 1"],
                "token_logprobs": [-0.25],
                "text_offset": [0],
            }
        return {"id": "1", "object": "text_completion", "created": 0, "model": "judge", "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}  # fmt: skip

    def say(self, status: int, body: dict, headers: dict | None = None):
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(text))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    """Serve on a free port; returns the handler class, whose `seen` are the requests."""
    handler = type("Served", (Endpoint,), {"seen": [], "busy": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield handler
    server.shutdown()
    server.server_close()


def engine_at(url: str, model: str = "judge", **settings) -> OpenAIEngine:
    config = EngineConfig(kind="openai", base_url=url, max_in_flight=4, **settings)
    return open_engine(config, Path(model), log=Path("unused"))


def test_each_sample_has_its_own_seed_and_a_busy_server_is_asked_again(endpoint):
    with engine_at(endpoint.url) as engine:
        said = list(engine.generate([Request("a", USER, n=3, seed=10), Request("b", USER, seed=20)]))
    assert sorted((c.request_id, c.index, c.text) for c in said) == [
        ("a", 0, " seed 10"), ("a", 1, " seed 11"), ("a", 2, " seed 12"), ("b", 0, " seed 20")
    ]  # fmt: skip
    assert {(c.n_tokens, c.finish_reason) for c in said} == {(3, "stop")}


def test_a_prefix_begins_the_assistants_turn_and_is_not_said_again(endpoint):
    with engine_at(endpoint.url) as engine:
        (said,) = engine.generate([Request("a", USER, prefix="Score:", seed=1, sampling=Sampling(stop=("\n",)))])
    assert said.text == " seed 1"
    sent = endpoint.seen[-1]
    assert sent["messages"][-1] == {"role": "assistant", "content": "Score:"}
    assert sent["continue_final_message"] is True
    assert sent["stop"] == ["\n"]


def test_raw_text_goes_to_completions(endpoint):
    with engine_at(endpoint.url) as engine:
        (said,) = engine.generate([Request("a", prefix="1. Red\n2.")])
    assert said.text == " after 1. Red\n2."
    assert endpoint.seen[-1]["path"] == "/v1/completions"


def test_what_the_endpoint_finds_too_long_is_too_long(endpoint):
    with engine_at(endpoint.url) as engine:
        (said,) = engine.generate([Request("a", ({"role": "user", "content": "word " * 1000},))])
    assert (said.finish_reason, said.text, said.n_tokens) == ("too_long", "", 0)


def test_choices_are_looked_for_after_what_they_share(endpoint):
    with engine_at(endpoint.url) as engine:
        (chat,) = engine.token_scores([Request("a", USER, prefix="Score:")], [" 3", " 4", " 5"])
        (raw,) = engine.token_scores([Request("b", prefix="Score:")], [" 1", " 2"])
        (unknown,) = engine.token_scores([Request("c", prefix="Score:")], ["yes", "no"])
    assert chat.logprobs == (-0.5, -1.5, float("-inf"))
    assert raw.logprobs == (-0.25, -2.0)
    assert unknown.logprobs is None


def test_an_endpoint_without_log_probabilities_says_so(endpoint):
    endpoint.logprobs = False
    with engine_at(endpoint.url) as engine:
        assert engine.capabilities == {"generate"}
        with pytest.raises(ModelError, match="gives none"):
            engine.token_scores([Request("a", USER)], ["1"])


def test_the_key_comes_from_the_environment_and_may_be_absent(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with engine_at(endpoint.url, api_key_env="JUDGE_KEY"):
        pass
    monkeypatch.delenv("JUDGE_KEY")
    with engine_at(endpoint.url, api_key_env="JUDGE_KEY"):
        pass
    assert [endpoint.seen[0]["key"], endpoint.seen[-1]["key"]] == ["Bearer s3cret", "Bearer EMPTY"]


def test_requests_are_pulled_as_others_finish(endpoint):
    pulled = []
    with engine_at(endpoint.url) as engine:
        answers = engine.generate(pulled.append(i) or Request(str(i), USER, seed=i) for i in range(100))
        next(answers)
        assert len(pulled) <= 9
        assert len(list(answers)) == 99


def test_a_missing_model_endpoint_or_address_is_said_with_a_remedy(endpoint):
    with pytest.raises(ModelError, match="it serves judge"), engine_at(endpoint.url, "another"):
        pass
    with pytest.raises(EngineDied, match=r"Start it, or mend its address"), engine_at("http://127.0.0.1:9/v1"):
        pass
    with pytest.raises(ConfigError, match="base_url"):
        open_engine(EngineConfig(kind="openai"), Path("judge"), log=Path("unused"))
